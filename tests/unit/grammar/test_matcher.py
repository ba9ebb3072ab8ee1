"""What a grammar allows: all of it and nothing else, from any place in a text, whichever way one came there."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.errors import InvalidRequest, RequestFailed
from qwen_ray.core.request import Grammar
from qwen_ray.grammar.lark import MAX_JSON_SPACE
from qwen_ray.grammar.matcher import MAX_KEPT, GrammarCompiler, Matcher
from qwen_ray.text.tokenizer import Tokenizer

PATIENCE = 40  # tokens, after which whatever can end a text is preferred
MAX_TOKENS = 600

scalars: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 500),
    ),
    st.just({"type": "number"}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.just({"type": "string", "pattern": "^[A-C]{2,3}-[0-9]+$"}),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.sampled_from(["red", "blue\n", "grün", 1, None, True]), min_size=1, unique_by=repr),
    ),
)


def containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["name", "a b", "ключ", 'q"'])
    return st.one_of(
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(
            lambda properties, count: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:count],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


schemas = st.recursive(scalars, containers, max_leaves=6)


def tokens_of(bits: bytearray) -> list[int]:
    return [i * 8 + bit for i, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1]


def say_something(matcher: Matcher, tokenizer: Tokenizer, chance: random.Random) -> list[int]:
    """Random tokens until the text is complete; after a while the ones that close things come first."""
    said: list[int] = []
    while len(said) < MAX_TOKENS:
        bits, is_complete = matcher.allowed()
        allowed = tokens_of(bits)
        if is_complete and (not allowed or len(said) > PATIENCE or chance.random() < 0.2):
            return said
        if len(said) > PATIENCE:
            closing = [i for i in allowed if tokenizer.token_bytes(i) in (b'"', b"]", b"}", b":", b",")]
            allowed = closing if closing and chance.random() < 0.9 else allowed
        said.append(chance.choice(allowed))
        matcher.add(said[-1:])
    pytest.fail(f"no end after {tokenizer.decode(said)!r}")


@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_whatever_is_said_validates(
    schema: dict[str, Any], seed: int, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.matcher(Grammar(kind="json_schema", text=json.dumps(schema)))
    said = say_something(matcher, tokenizer, random.Random(seed))
    jsonschema.validate(json.loads(tokenizer.decode(said, skip_special_tokens=False)), schema)


@settings(max_examples=30, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32), data=st.data())
def test_the_same_tokens_lead_to_the_same_place(
    schema: dict[str, Any], seed: int, data: st.DataObject, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    said = say_something(compiler.matcher(grammar), tokenizer, random.Random(seed))
    one_by_one, masks = compiler.matcher(grammar), []
    for token in said:
        masks.append(one_by_one.allowed())
        one_by_one.add([token])
    cut = data.draw(st.integers(0, len(said)))
    resumed = compiler.matcher(grammar)
    resumed.add(said[:cut])
    for token, mask in zip(said[cut:], masks[cut:], strict=True):
        assert resumed.allowed() == mask
        resumed.add([token])
    assert resumed.allowed() == one_by_one.allowed()


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"[A-Z][a-z]{1,8} \d{2,4}", r"[A-Z][a-z]{1,8} \d{2,4}"),
        ("regex", r"^(yes|no)$", "yes|no"),
        ("regex", r"a/b\$", r"a/b\$"),
        ("choice", json.dumps(['one "two"', "b\\c", "Grüße\n"]), 'one "two"|b\\\\c|Grüße\n'),
        ("choice", json.dumps([f"option {i}" for i in range(3000)]), r"option \d+"),
        ("grammar", 'start: greeting " " NAME\ngreeting: "hi" | "ho"\nNAME: /[a-z]+/', "h[io] [a-z]+"),
        ("grammar", 'root ::= "x" [0-9]* ("!" | "?")', r"x[0-9]*[!?]"),
        ("grammar", 'start: "call " %json {"enum": [1, 2]}', "call [12]"),
    ],
)
def test_every_kind(kind: Any, text: str, pattern: str, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        said = say_something(compiler.matcher(Grammar(kind=kind, text=text)), tokenizer, random.Random(seed))
        assert re.fullmatch(pattern, tokenizer.decode(said, skip_special_tokens=False))


def test_a_json_object_is_one(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        said = say_something(compiler.matcher(Grammar(kind="json_object")), tokenizer, random.Random(seed))
        assert isinstance(json.loads(tokenizer.decode(said)), dict)


def test_what_is_no_text_is_never_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar(kind="regex", text="(?s:.*)"))
    bits, is_complete = matcher.allowed()
    allowed = set(tokens_of(bits))
    assert is_complete
    assert tokenizer.thinking is not None
    no_text = {*tokenizer.special_token_ids, tokenizer.thinking.start_id, tokenizer.thinking.end_id}
    assert len(no_text) == 4
    assert not allowed & no_text
    assert max(allowed) < tokenizer.vocab_size  # the ids above it are nothing
    assert len(allowed) > 300


def test_white_space_has_an_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar(kind="json_object"))
    matcher.add(tokenizer.encode("{" + " " * MAX_JSON_SPACE))
    bits, _ = matcher.allowed()
    assert {tokenizer.token_bytes(i)[:1] for i in tokens_of(bits)} == {b'"', b"}"}


def test_a_token_that_was_not_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar(kind="regex", text="[0-9]+"))
    with pytest.raises(RequestFailed):
        matcher.add(tokenizer.encode("x"))


def test_options_of_llguidance_in_a_schema_mean_nothing(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        compiler.matcher(Grammar(kind="json_schema", text=json.dumps(schema)))


def test_few_are_kept(compiler: GrammarCompiler) -> None:
    for number in range(MAX_KEPT + 10):
        compiler.matcher(Grammar(kind="regex", text=f"a{number}"))
    assert len(compiler._kept) == MAX_KEPT
