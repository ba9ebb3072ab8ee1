"""What is rendered from something else is in step with it: `make render` writes it."""

from __future__ import annotations

import yaml
from charts import CHART, READY, check

from deploy import render


def test_the_schema_is_that_of_settings() -> None:
    assert (CHART / "values.schema.json").read_text(encoding="utf-8") == render.schema_text()


def test_every_value_has_a_place_in_the_schema_and_the_other_way_round() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert set(values) == set(render.values_schema()["properties"]) - {"global"}


def test_manifests_are_those_of_the_chart(helm: str) -> None:
    assert sorted(render.READY) == READY
    made = render.manifests(helm)
    assert {file.name: file.read_text(encoding="utf-8") for file in render.MANIFESTS.iterdir()} == made
    for text in made.values():
        check([one for one in yaml.safe_load_all(text) if one])


def test_rules_and_dashboards_are_those_of_observability() -> None:
    held = {file: file.read_text(encoding="utf-8") for file in (CHART / "files").rglob("*.*")}
    assert held == render.copies()
