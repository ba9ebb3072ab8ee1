"""What was measured as one table in Markdown: medians, their spread, and ours over the best peer's.

Knows results; runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.peers.figures import Figure, Measured
from benchmarks.peers.peer import PRECISIONS
from benchmarks.peers.registry import OURS, is_ours
from benchmarks.peers.results import MEMORY, START, Results
from benchmarks.peers.workloads import WORKLOADS

EMPTY = "–"
TENSOR_PARALLEL = "qwen-ray-tp2"
ROWS: dict[str, tuple[Figure, ...]] = {
    **{name: workload.figures for name, workload in WORKLOADS.items()},
    START: (Figure(name="first_token_s", unit="s", more_is_better=False),),
    MEMORY: (
        Figure(name="peak_rss_gb", unit="GB", more_is_better=False),
        Figure(name="pss_gb", unit="GB", more_is_better=False),
        Figure(name="largest_rss_gb", unit="GB", more_is_better=False),
    ),
}


def render(results: Results, servers: Sequence[str], models: Sequence[str], weight_bytes: dict[str, int]) -> str:
    """All models and precisions that have anything. `weight_bytes`: what a bf16 decode step reads, by model."""
    parts = [_machine(results)]
    for model in models:
        for precision in PRECISIONS:
            lines = list(_rows(results, servers, model, precision))
            if lines:
                parts.append("\n".join([f"### {model}, {precision}", "", *_head(results, servers, model, precision)]))
                parts[-1] += "\n" + "\n".join(lines)
                parts += _notes(results, servers, model, precision, weight_bytes)
    parts += [f"Failed: {name}: {why}" for name, why in sorted(results.failures.items())]
    return "\n\n".join(parts)


def best_peer(values: dict[str, Measured | None], figure: Figure) -> str | None:
    """The peer, not ours, with the best median."""
    known = {name: one.median for name, one in values.items() if one and not is_ours(name)}
    if not known:
        return None
    return (max if figure.more_is_better else min)(known, key=known.__getitem__)


def ratio_to_best(values: dict[str, Measured | None], figure: Figure) -> float | None:
    """Above 1: ours is better."""
    best, ours = best_peer(values, figure), values.get(OURS)
    other = values[best] if best else None
    return figure.ratio(ours.median, other.median) if ours and other and ours.median and other.median else None


def _rows(results: Results, servers: Sequence[str], model: str, precision: str) -> Iterator[str]:
    for workload, figures in ROWS.items():
        for figure in figures:
            values = {server: results.measured(server, model, precision, workload, figure.name) for server in servers}
            if not any(values.values()):
                continue
            best, ratio = best_peer(values, figure), ratio_to_best(values, figure)
            label = figure.name.removesuffix("_" + figure.unit.lower()).replace("_tokens_per_s", "").replace("_", " ")
            cells = [_shown(values[server], is_best=server == best) for server in servers]
            yield _line(f"{workload} {label}, {figure.unit}", *cells, f"{ratio:.2f}" if ratio else EMPTY)


def _head(results: Results, servers: Sequence[str], model: str, precision: str) -> Iterator[str]:
    titles: list[str] = []
    for server in servers:
        forms = [cell.form for cell in results.of(server, model, precision, START)]
        titles.append(f"{server} ({forms[-1]})" if forms and forms[-1] != precision else server)
    yield _line("", *titles, "ours : best peer")
    yield _line("---", *["--:"] * (len(servers) + 1))


def _notes(
    results: Results, servers: Sequence[str], model: str, precision: str, weight_bytes: dict[str, int]
) -> Iterator[str]:
    rate = results.rates.get(f"{model} {precision}")
    if rate:
        yield f"W5: {rate:.2f} requests/s for all, 70 % of the best peer's W2."
    for server in (OURS, TENSOR_PARALLEL):
        cells = results.of(server, model, precision, "W1")
        if precision == "bf16" and model in weight_bytes and cells:
            parts = [cell.figures["decode_tokens_per_s"] * weight_bytes[model] / cell.bandwidth for cell in cells]
            yield f"{server} W1 reads weights at {Measured.of(parts).median:.0%} of the bandwidth of its own sessions."
    for workload in ("W1", "W2"):
        figure = ROWS[workload][0]
        two, one = (results.measured(name, model, precision, workload, figure.name) for name in (TENSOR_PARALLEL, OURS))
        if two and one:
            yield f"tp=2 : tp=1, {workload}: {figure.ratio(two.median, one.median):.2f}"


def _machine(results: Results) -> str:
    machine = results.machine
    reads = [cell.bandwidth for cell in results.cells.values()]
    bandwidth = ""
    if reads:
        read = Measured.of(reads)
        bandwidth = f"; memory read at {read.median / 1e9:.1f} GB/s ± {read.spread:.0%}"
    cpu, cores = machine.get("cpu", "?"), machine.get("cores", "?")
    return f"{cpu}, {cores} cores{bandwidth}. Medians ± half of the range over the rounds. **Bold**: the best peer."


def _shown(value: Measured | None, *, is_best: bool) -> str:
    if value is None:
        return EMPTY
    number = f"{value.median:.{0 if value.median >= 100 else 1 if value.median >= 10 else 2}f}"
    number = f"**{number}**" if is_best else number
    return number if value.num_rounds < 2 else f"{number} ±{value.spread:.0%}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
