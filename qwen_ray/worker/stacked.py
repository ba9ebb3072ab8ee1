"""Experts that a checkpoint keeps in one tensor, each under the name that it has where experts are kept apart.

Knows the two ways to stack them: by projection, as in GGUF files, and gate and up together, as transformers 5 has them
in memory and saves them with `save_original_format=False`. Knows nothing of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.plan import Span
from qwen_ray.worker.stored import StoredTensor

STACK_NAME = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up|gate|up|down)_proj(?:\.weight)?")
PROJECTIONS = {
    "gate_up": ("gate_proj", "up_proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj",),
    "down": ("down_proj",),
}


def unstacked(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors; in place of `….mlp.experts.gate_proj` [experts, rows, columns] there are
    `….mlp.experts.0.gate_proj.weight` [rows, columns] and so on. Raises CheckpointError for other shapes.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = STACK_NAME.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        projections = PROJECTIONS[match[2]]
        if len(tensor.shape) != 3 or tensor.shape[1] % len(projections):
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has the wrong shape; expected [experts, rows, columns] with "
                f"rows for {' and '.join(projections)}, found {tensor.shape}."
            )
        rows = tensor.shape[1] // len(projections)
        parts = [f"{expert}.{projection}" for expert in range(tensor.shape[0]) for projection in projections]
        found |= {f"{match[1]}.{part}.weight": tensor.cut(Span(i, i + 1).scaled(rows)) for i, part in enumerate(parts)}
    return found
