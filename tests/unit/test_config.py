from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwen_ray.config import OPTIONS, PlanSettings, Settings, load_settings
from qwen_ray.core.errors import SettingsError


def test_defaults_serve_the_demo() -> None:
    settings = load_settings(environ={})
    assert settings.models[0].name == "demo"
    assert settings.http.port == 8000


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"models": [{"source": "a/b", "max_model_len": "8k"}], "http": {"port": 1}}))
    environ = {"QWEN_RAY_PORT": "2", "QWEN_RAY_TP": "3", "QWEN_RAY_HOST": "0.0.0.0"}
    settings = load_settings(file, {"port": 4, "pp": 2, "dtype": None}, environ)
    assert (settings.http.port, settings.http.host) == (4, "0.0.0.0")
    model = settings.models[0]
    assert model.plan != "auto"
    assert (model.source, model.name, model.max_model_len) == ("a/b", "a/b", 8192)
    assert (model.plan.tp, model.plan.pp) == (3, 2)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"htpp": {}}, "htpp"),
        ({"http": {"port": 0}}, "http.port"),
        ({"models": [{"dtype": "int3"}]}, "models.0.dtype"),
        ({"models": [{"replicas": {"min": 3, "max": 2}}]}, "models.0.replicas"),
        ({"models": []}, "models"),
        ({"engine": {"kv_cache_memory": "lots"}}, "engine.kv_cache_memory"),
        ({"http": {"ssl_certfile": "cert.pem"}}, "http"),
        ({"http": {"max_open_requests": 0}}, "http.max_open_requests"),
        ({"observability": {"audit_max_bytes": "lots"}}, "observability.audit_max_bytes"),
    ],
)
def test_a_wrong_key_is_named(data: dict[str, object], field: str) -> None:
    with pytest.raises(SettingsError, match=field.replace(".", r"\.")) as caught:
        Settings.from_dict(data)
    assert caught.value.field == field


def test_every_option_sets_an_existing_key() -> None:
    known = Settings().model_dump()
    known["models"] = [known["models"][0] | {"plan": PlanSettings().model_dump()}]
    for key in OPTIONS.values():
        at: object = known
        for part in key.split("."):
            at = at[int(part)] if isinstance(at, list | tuple) else at[part]  # type: ignore[index]


def test_settings_survive_their_own_json() -> None:
    settings = Settings.from_dict(
        {"models": [{"source": "demo", "plan": {"tp": 2}}], "engine": {"kv_cache_memory": "1GiB"}}
    )
    assert Settings.from_dict(settings.to_dict()) == settings
    assert settings.engine.kv_cache_memory == 2**30


def test_experts_are_a_section_of_their_model() -> None:
    flags = {"ep": "2", "dp-attention": "2", "num-redundant-experts": "4", "expert-load": "~/load.json"}
    model = load_settings(None, flags, {}).models[0]
    assert isinstance(model.plan, PlanSettings)
    assert (model.plan.ep, model.plan.dp_attention) == (2, 2)
    assert model.experts.num_redundant_experts == 4
    assert model.experts.load == Path.home() / "load.json"
    assert model.experts.rebalance_seconds is None
    eager = load_settings(None, {"enable-eplb": True, "eplb-interval": "1.5"}, {})
    assert eager.models[0].experts.rebalance_seconds == 1.5
    assert Settings.from_dict(eager.to_dict()) == eager


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        load_settings(tmp_path / "nowhere.yaml", environ={})
