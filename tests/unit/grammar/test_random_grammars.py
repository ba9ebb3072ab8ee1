"""The short form of tests/clients/test_structured.py: some of its hostile grammars, without a server.

Answers to random schemas are test_matcher.py's.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from random_grammars import hostile_grammars

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.grammar.check_process import in_a_fork, tried
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.serving.grammar_schema import GrammarFields

EVERY = 13  # of them: every family has some


def test_what_is_hostile_is_refused(compiler: GrammarCompiler) -> None:
    grammars = list(hostile_grammars())
    assert len(grammars) >= 200
    for name, fields in grammars[::EVERY]:
        assert is_refused(fields, compiler), name


def is_refused(fields: dict[str, Any], compiler: GrammarCompiler) -> bool:
    try:
        asked = GrammarFields.model_validate(fields).grammar()
    except (InvalidRequest, ValidationError):
        return True
    assert asked is not None
    return in_a_fork(lambda: tried(compiler, asked[1]))[0] is not None
