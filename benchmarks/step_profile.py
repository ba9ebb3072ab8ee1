"""Where the time of a decode step goes: by part of the model, and in each by matrix products, other operations, Python.

Knows torch's profiler and which layer class is which part. Parts are marked by hooks on modules, so layers must not be
computed in one call: `kernel_by_kernel` takes them apart. What that and the profiler cost is in the figures: compare
the step with one as it is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from in_process import STEP
from rich.table import Table
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from qwen_ray.layers.attention import Attention
from qwen_ray.layers.embedding import Head
from qwen_ray.layers.experts import Experts
from qwen_ray.layers.linear import ColumnParallelLinear, RowParallelLinear
from qwen_ray.layers.moe import Moe
from qwen_ray.layers.norm import RMSNorm
from qwen_ray.models.stage import Stage

PARTS: dict[type[nn.Module], str] = {
    Experts: "experts",
    Head: "LM head",
    ColumnParallelLinear: "projections",  # attention's
    RowParallelLinear: "projections",
    Attention: "attention",
    Moe: "router",
    RMSNorm: "norms",
    Stage: "sums",  # residuals, and the embedding
}
NAMES = (*dict.fromkeys(PARTS.values()), STEP)
PRODUCTS = ("aten::linear", "aten::scaled_dot_product_attention")


@dataclass(slots=True, kw_only=True)
class PartTime:
    """Seconds of one step in one part, the parts inside it not counted."""

    products: float = 0.0
    other_operations: float = 0.0
    python: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.other_operations + self.python


@contextmanager
def kernel_by_kernel(model: Stage) -> Iterator[None]:
    """Whatever the model computes in one call is computed in many meanwhile: the same bits, and parts can be seen."""
    kept: list[tuple[Any, dict[str, Any]]] = [(module, dict(vars(module))) for module in model.modules()]
    for module, own in kept:
        if "_at_once" in own:
            module._at_once = None
        if isinstance(module, Attention):
            module._kernels = replace(own["_kernels"], of_layers=None)
    try:
        yield
    finally:
        for module, own in kept:
            vars(module).update(own)


class StepProfile:
    """Runs between `start` and `stop`, on the thread that computes; every step stands in `in_process.marked_step()`."""

    def __init__(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CPU])
        self._open: list[record_function] = []

    def start(self) -> None:
        self._hooks = (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave))
        self._profiler.start()

    def stop(self) -> None:
        self._profiler.stop()
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        if type(module) in PARTS:
            self._open.append(record_function(PARTS[type(module)]))
            self._open[-1].__enter__()

    def _leave(self, module: nn.Module, _: Any, result: Any) -> None:
        if type(module) in PARTS:
            self._open.pop().__exit__(None, None, None)

    def parts(self) -> dict[str, PartTime]:
        """Of the mean step, the slowest part first."""
        found = {name: PartTime() for name in NAMES}
        steps = [event for event in self._profiler.events() or () if event.name == STEP]
        for step in steps:
            _add_up(step, found[STEP], found)
        for part in found.values():
            part.products /= len(steps)
            part.other_operations /= len(steps)
            part.python /= len(steps)
        return dict(sorted(found.items(), key=lambda item: -item[1].total))


def _add_up(event: FunctionEvent, part: PartTime, found: dict[str, PartTime]) -> None:
    rest = event.cpu_time_total
    for child in event.cpu_children:
        rest -= child.cpu_time_total
        if child.name in found:
            _add_up(child, found[child.name], found)
        elif child.name in PRODUCTS:
            part.products += child.cpu_time_total * 1e-6
        else:
            part.other_operations += child.cpu_time_total * 1e-6
    part.python += rest * 1e-6


def lost(parts: dict[str, PartTime], least: dict[str, float]) -> dict[str, float]:
    """Seconds of each part beyond the `least` that the machine needs for it, the most first."""
    seconds = {name: part.total - least.get(name, 0.0) for name, part in parts.items()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def parts_table(title: str, parts: dict[str, PartTime], part_bytes: dict[str, float], least: dict[str, float]) -> Table:
    """Times in milliseconds."""
    table = Table("part", title=title)
    for name in ("ms", "%", "products", "other ops", "Python", "MB", "GB/s", "lost"):
        table.add_column(name, justify="right")
    whole = sum(part.total for part in parts.values())
    losses = lost(parts, least)
    for name, part in parts.items():
        num_bytes = part_bytes.get(name)
        table.add_row(
            name,
            f"{1e3 * part.total:.1f}",
            f"{100 * part.total / whole:.0f}",
            *(f"{1e3 * seconds:.1f}" for seconds in (part.products, part.other_operations, part.python)),
            f"{num_bytes / 1e6:.0f}" if num_bytes else "",
            f"{num_bytes / part.total / 1e9:.1f}" if num_bytes else "",
            f"{1e3 * losses[name]:.1f}",
        )
    return table
