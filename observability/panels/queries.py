"""PromQL over the metrics of the catalog, with the dashboards' variables in it. Knows series; not how they are drawn.

A series may be scraped more than once (each pod of a cluster shows the whole fleet), so `max by` its own labels comes
before every sum. A name that is not in the catalog is a KeyError.
"""

from __future__ import annotations

from qwen_ray.metrics.catalog import BY_OWNER, Metric, Owner

ROWS: dict[str, tuple[Owner, Metric]] = {row.name: (owner, row) for owner, rows in BY_OWNER.items() for row in rows}
# What tells series of a process apart, and how a dashboard chooses among processes.
IDENTITY: dict[Owner, tuple[str, ...]] = {
    "ingress": ("model_name", "ingress"),
    "replica": ("model_name", "replica"),
    "rank": ("model_name", "replica", "rank"),
}
CHOSEN: dict[Owner, str] = {
    "ingress": 'model_name=~"$model_name", ingress=~"$ingress"',
    "replica": 'model_name=~"$model_name", replica=~"$replica"',
    "rank": 'model_name=~"$model_name", replica=~"$replica"',
}
INTERVAL = "$__rate_interval"


def series(name: str, where: str = "", suffix: str = "") -> str:
    owner, _ = ROWS[name]
    return f"{name}{suffix}{{{', '.join(filter(None, (CHOSEN[owner], where)))}}}"


def total(name: str, by: str = "model_name", where: str = "") -> str:
    """Of a gauge, added up over processes."""
    return f"sum by ({by}) (max by ({_own(name)}) ({series(name, where)}))"


def most(name: str, by: str = "model_name", where: str = "") -> str:
    """Of a gauge, the largest; also one that every process sees alike."""
    return f"max by ({by}) ({series(name, where)})"


def per_second(name: str, by: str = "model_name", where: str = "", suffix: str = "") -> str:
    """Of a counter."""
    rate = f"rate({series(name, where, suffix)}[{INTERVAL}])"
    return f"sum by ({by}) (max by ({_own(name)}) ({rate}))"


def grown(name: str, by: str = "model_name", where: str = "", over: str = "1h") -> str:
    """By how much a counter has grown."""
    return f"sum by ({by}) (max by ({_own(name)}) (increase({series(name, where)}[{over}])))"


def quantile(q: float, name: str, by: str = "model_name") -> str:
    """Of a histogram."""
    rate = f"rate({series(name, suffix='_bucket')}[{INTERVAL}])"
    return f"histogram_quantile({q}, sum by ({by}, le) (max by ({_own(name)}, le) ({rate})))"


def mean(name: str, by: str = "model_name") -> str:
    """Of a histogram."""
    return f"{per_second(name, by, suffix='_sum')} / {per_second(name, by, suffix='_count')}"


def recorded(name: str, where: str = "") -> str:
    """Of observability/prometheus/rules/recording.yaml."""
    labels = ", ".join(filter(None, ('model_name=~"$model_name"', where)))
    return f"qwen_ray:{name}{{{labels}}}"


def _own(name: str) -> str:
    owner, row = ROWS[name]
    return ", ".join((*IDENTITY[owner], *row.labels))
