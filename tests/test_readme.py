"""What the README says is so."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import qwen_ray
from qwen_ray.cli import app
from qwen_ray.config import Settings
from qwen_ray.core import errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
PLAIN_HELP = {"COLUMNS": "300", "NO_COLOR": "1"}


def test_settings_examples_are_settings() -> None:
    examples = [text for kind, text in BLOCKS if kind == "yaml"]
    assert examples
    for text in examples:
        settings = Settings.from_dict(yaml.safe_load(text))
        assert settings.models[0].max_model_len == 4096


@pytest.mark.parametrize("line", [line for line in COMMANDS if "qwen-ray" in line])
def test_commands_and_their_flags_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    command = words[words.index(".venv/bin/qwen-ray") + 1]
    shown = CliRunner().invoke(app, [command, "--help"], env=PLAIN_HELP)
    assert shown.exit_code == 0
    for flag in (word for word in words if word.startswith("--")):
        assert flag in shown.output


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make")])
def test_make_targets_exist(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_table_of_commands_is_whole() -> None:
    listed = set(re.findall(r"^\| `qwen-ray (\w+)", README, re.MULTILINE))
    assert listed == {command.callback.__name__ for command in app.registered_commands if command.callback}


def test_python_examples_use_what_there_is() -> None:
    examples = [ast.parse(text) for kind, text in BLOCKS if kind == "python"]
    names = {
        alias.name
        for tree in examples
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "qwen_ray"
        for alias in node.names
    }
    assert names
    assert names <= set(qwen_ray.__all__)


def test_the_tree_is_the_tree() -> None:
    (tree,) = [text for _, text in BLOCKS if text.startswith("qwen_ray/")]
    described = set(re.findall(r"\b(\w+)(?:/|\.py)", tree)) - {"qwen_ray"}
    package = ROOT / "qwen_ray"
    parts = {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    files = {p.stem for p in package.glob("*.py")} - {"__init__"}
    assert described == parts | files


def test_endpoints_are_routes() -> None:
    source = (ROOT / "qwen_ray/serving/routes.py").read_text()
    (sentence,) = re.findall(r"^Endpoints: (.*?)\.$", README, re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`(/[^`]+)`", sentence):
        assert f'"{path}"' in source


def test_exit_codes_are_those_of_the_errors() -> None:
    kinds = [errors.QwenRayError, errors.SettingsError, errors.SourceError, errors.CheckpointError, errors.PlanRefused]
    (sentence,) = re.findall(r"Exit codes: (.*?)\.\n", README, re.DOTALL)
    codes = [int(code) for code in re.findall(r"\b\d+\b", sentence)]
    assert codes == [0, *(kind.exit_code for kind in kinds), 130]


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
