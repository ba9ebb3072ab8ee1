"""Writes observability/dashboards/*.json: `python -m observability.panels`, or `make dashboards`."""

from __future__ import annotations

import json
from pathlib import Path

from observability.panels.capacity import CAPACITY
from observability.panels.cluster import CLUSTER
from observability.panels.engine import ENGINE
from observability.panels.service import SERVICE

FOLDER = Path(__file__).parents[1] / "dashboards"


def files() -> dict[Path, str]:
    """What is to stand where."""
    dashboards = (SERVICE, ENGINE, CLUSTER, CAPACITY)
    return {FOLDER / f"{each.name}.json": json.dumps(each.to_json(), indent=2) + "\n" for each in dashboards}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
