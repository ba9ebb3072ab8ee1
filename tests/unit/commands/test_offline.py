"""What `chat` prints: thinking dim and on terminals only, the answer everywhere."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from qwen_ray.commands import offline

PIECES = [("Hm", ""), (".", ""), ("", "So"), ("", ".")]


@pytest.mark.parametrize(
    ("is_terminal", "expected"), [(True, "\x1b[2mHm\x1b[0m\x1b[2m.\x1b[0m\n\nSo.\n"), (False, "So.\n")]
)
def test_thinking_is_shown_on_terminals(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, expected: str) -> None:
    file = StringIO()
    monkeypatch.setattr(offline, "out", Console(file=file, force_terminal=is_terminal))
    assert offline._show(iter(PIECES)) == "So."
    assert file.getvalue() == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"text": "a"}, ("", "a")),
        ({"delta": {"content": "a", "reasoning_content": None}}, ("", "a")),
        ({"delta": {"content": None, "reasoning_content": "b"}}, ("b", "")),
        ({"delta": {"reasoning": "b"}}, ("b", "")),
        ({"delta": {}}, ("", "")),
    ],
)
def test_servers_answers(choice: dict[str, object], expected: tuple[str, str]) -> None:
    assert list(offline._texts({"choices": [choice]})) == [expected]
