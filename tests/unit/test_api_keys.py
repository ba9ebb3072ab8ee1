"""Keys are known by their hashes, and no message shows what somebody wrote in their place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from qwen_ray.api_keys import EMPTY_SHA256, ApiKey, new_key, read_api_keys
from qwen_ray.config import Settings, load_settings
from qwen_ray.core.errors import SettingsError

ONE, TWO = (hashlib.sha256(key).hexdigest() for key in (b"one", b"two"))


def test_a_key_of_the_command_line_or_the_environment_is_hashed_at_once() -> None:
    by_flag = load_settings(None, {"api-key": "one"}, {"QWEN_RAY_API_KEY": "two"})
    by_variable = load_settings(None, {}, {"QWEN_RAY_API_KEY": "12345"})
    assert [key.sha256 for key in by_flag.http.api_keys] == [ONE]
    assert by_variable.http.api_keys[0].sha256 == hashlib.sha256(b"12345").hexdigest()
    assert by_flag.http.api_keys[0].id == f"key-{ONE[:8]}"
    dumped = json.dumps(by_variable.to_dict()) + repr(by_variable) + str(by_variable)
    assert "12345" not in dumped.replace(by_variable.http.api_keys[0].sha256, "")
    assert Settings.from_dict(json.loads(json.dumps(by_flag.to_dict()))) == by_flag


@pytest.mark.parametrize("key", ["", " ", "two words", "line\n", "ключ"])
def test_a_key_that_nobody_could_send(key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {}, {"QWEN_RAY_API_KEY": key})
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        "my-secret",
        {"id": "a", "sha256": "my-secret"},
        {"sha256": ["my-secret"]},
        {"id": "my secret", "sha256": ONE},
        {"key": "my-secret", "sha256": ONE},
        {"id": "a", "sha256": EMPTY_SHA256},
        {"id": "a", "sha256": ONE, "weight": 0},
        {"id": "a", "sha256": ONE, "requests_per_minute": 0},
        {"id": "a"},
    ],
)
def test_wrong_entries_are_refused_without_showing_them(entry: object, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump([entry]))
    for read in (lambda: Settings.from_dict({"http": {"api_keys": [entry]}}), lambda: read_api_keys(file)):
        with pytest.raises(SettingsError) as caught:
            read()
        assert "secret" not in str(caught.value)
        assert "secret" not in repr(caught.value.__cause__ and caught.value.__cause__.args)


@pytest.mark.parametrize("second", [{"id": "a", "sha256": TWO}, {"id": "b", "sha256": ONE.upper()}])
def test_two_of_a_kind(second: dict[str, str], tmp_path: Path) -> None:
    entries = [{"id": "a", "sha256": ONE}, second]
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    with pytest.raises(SettingsError, match="two keys"):
        Settings.from_dict({"http": {"api_keys": entries}})
    with pytest.raises(SettingsError, match="two keys"):
        read_api_keys(tmp_path / "keys.json")


@pytest.mark.parametrize(
    "text",
    [
        f"# comment\n{ONE} a\n\n{TWO.upper()} b\n",
        f"- {{id: a, sha256: {ONE}}}\n- {{id: b, sha256: {TWO}}}\n",
        f'[{{"id": "a", "sha256": "{ONE}"}}, {{"id": "b", "sha256": "{TWO}"}}]',
        f"api_keys:\n  - {{id: a, sha256: {ONE}}}\n  - {{id: b, sha256: {TWO}}}\n",
    ],
)
def test_files_of_keys(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    assert [(key.id, key.sha256) for key in read_api_keys(tmp_path / "keys")] == [("a", ONE), ("b", TWO)]


@pytest.mark.parametrize("text", ["qr-a-real-key\n", "a: b: c\n", f"{ONE} a b c\n", "{}\n"])
def test_files_of_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(SettingsError, match="qwen-ray key") as caught:
        read_api_keys(tmp_path / "keys")
    assert "real-key" not in str(caught.value)


def test_new_keys() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(len(key) > 40 and ApiKey.of(key).sha256 for key in made)
