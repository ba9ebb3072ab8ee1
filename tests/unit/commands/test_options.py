"""Flags, environment variables and settings keys are one thing under three names."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qwen_ray.cli import app
from qwen_ray.commands.options import ALL_FLAGS, ModelArgument, environment_variable, with_settings
from qwen_ray.config import OPTIONS, Settings
from qwen_ray.core.errors import SettingsError


def _parse(*arguments: str) -> Settings:
    """The settings that a command with all flags is called with."""
    seen: list[Settings] = []
    alone = typer.Typer(pretty_exceptions_enable=False)

    @alone.command()
    @with_settings(*ALL_FLAGS)
    def command(*, settings: Settings, model: ModelArgument = None) -> None:
        seen.append(settings)

    result = CliRunner().invoke(alone, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_setting_is_a_flag_of_serve() -> None:
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
    assert set(ALL_FLAGS) == OPTIONS.keys() - {"model"}
    for flag in ALL_FLAGS:
        assert f"--{flag}" in help_text
        assert OPTIONS[flag].replace("models.0", "models[0]") in help_text


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "models: [{source: demo, max_model_len: 1k}]\nhttp: {port: 1, host: a}\nengine: {max_num_seqs: 3}\n"
    )
    monkeypatch.setenv(environment_variable("port"), "2")
    monkeypatch.setenv(environment_variable("host"), "b")
    settings = _parse("-f", str(file), "--port", "4", "--no-enable-prefix-caching", "--tp", "2")
    assert (settings.http.port, settings.http.host, settings.engine.max_num_seqs) == (4, "b", 3)
    assert settings.models[0].max_model_len == 1024
    assert settings.engine.enable_prefix_caching is False
    assert settings.models[0].plan != "auto"
    assert settings.models[0].plan.tp == 2


def test_the_model_is_an_argument() -> None:
    assert _parse("org/name").models[0].source == "org/name"
    assert _parse().models[0].source == "demo"


@pytest.mark.parametrize(("flag", "value"), [("--port", "many"), ("--dtype", "int3"), ("--tp", "0")])
def test_wrong_values_name_the_key(flag: str, value: str) -> None:
    with pytest.raises(SettingsError, match=r"port|dtype|plan"):
        _parse(flag, value)
