"""Panels and dashboards as Grafana's JSON. Knows its schema and the grid; not what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["timeseries", "stat", "bargauge"]
WIDTH = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCHEMA_VERSION = 39


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`queries`: what is drawn, by its legend. `steps`: (from this value on, colour), the first from the lowest on."""

    title: str
    text: str  # what it says to whoever is on call
    unit: str  # Grafana's name of it
    queries: dict[str, str]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    decimals: int | None = None
    steps: tuple[tuple[float | None, str], ...] = ()
    colours: dict[str, str] = field(default_factory=dict)  # by legend, where a colour has a meaning

    def to_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        steps = [{"value": value, "color": colour} for value, colour in self.steps or ((None, "green"),)]
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "min": 0,
            "thresholds": {"mode": "absolute", "steps": steps},
            "color": {"mode": "palette-classic" if self.kind == "timeseries" else "thresholds"},
            "noValue": "none",
        }
        if self.maximum is not None:
            defaults["max"] = self.maximum
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        if self.kind == "timeseries":
            defaults["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 30 if self.stacked else 5,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "line" if self.steps else "off"},
            }
        targets = [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "instant": self.kind != "timeseries",
                "range": self.kind == "timeseries",
            }
            for i, (legend, expression) in enumerate(self.queries.items())
        ]
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": [_coloured(*pair) for pair in self.colours.items()]},
            "options": _OPTIONS[self.kind],
            "targets": targets,
        }


def _coloured(legend: str, colour: str) -> dict[str, Any]:
    value = {"mode": "fixed", "fixedColor": colour}
    return {"matcher": {"id": "byName", "options": legend}, "properties": [{"id": "color", "value": value}]}


_REDUCED = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[Kind, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["mean", "lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": _REDUCED,
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "value_and_name",
        "justifyMode": "auto",
        "orientation": "auto",
    },
    "bargauge": {"reduceOptions": _REDUCED, "displayMode": "basic", "orientation": "horizontal", "showUnfilled": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """`rows`: a heading, and its panels from left to right, wrapped where the grid ends."""

    name: str
    title: str
    text: str
    rows: dict[str, Sequence[Panel]]
    variables: dict[str, str] = field(default_factory=dict)  # by name, the metric that has the label

    def to_json(self) -> dict[str, Any]:
        panels: list[dict[str, Any]] = []
        y = 0
        for title, row in self.rows.items():
            heading = {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": []}
            panels.append({**heading, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
            x, y, height = 0, y + 1, 0
            for panel in row:
                if x + panel.width > WIDTH:
                    x, y, height = 0, y + height, 0
                panels.append(panel.to_json(len(panels) + 1, x, y))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return {
            "uid": f"qwen-ray-{self.name}",
            "title": f"qwen-ray / {self.title}",
            "description": self.text,
            "tags": ["qwen-ray"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "links": [{"type": "dashboards", "title": "qwen-ray", "tags": ["qwen-ray"], "asDropdown": False}],
            "templating": {"list": [_DATASOURCE, *(_variable(n, m) for n, m in self.variables.items())]},
            "annotations": {"list": []},
            "panels": panels,
        }


_DATASOURCE = {"name": "datasource", "type": "datasource", "label": "Prometheus", "query": "prometheus"}


def _variable(name: str, metric: str) -> dict[str, Any]:
    """A choice of one, several or all values of a label."""
    chosen = "" if name == "model_name" else '{model_name=~"$model_name"}'
    query = f"label_values({metric}{chosen}, {name})"
    return {
        "name": name,
        "type": "query",
        "label": name.replace("_", " "),
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "A"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }
