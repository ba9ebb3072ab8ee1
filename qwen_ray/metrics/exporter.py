"""Prometheus text: one process's, and several processes' merged into one valid exposition.

Knows the text format (HELP and TYPE once per family, its samples after them); not what the names mean.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def merge(texts: Iterable[str]) -> str:
    """Families by name in the order of first sight, the processes' samples together.

    When series were created (`_created`) is left out: it doubles the number of series and nobody asks for it.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        is_new = False
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                if line.startswith("# HELP "):
                    is_new = name not in heads
                    heads.setdefault(name, [])
                family = name
                if is_new:
                    heads[name].append(line)
            elif line:
                samples.setdefault(family, []).append(line)
    lines: list[str] = []
    for name, head in heads.items():
        if not name.endswith("_created"):
            lines += head + samples.get(name, [])
    return "\n".join(lines) + "\n"
