"""A grammar is part of what a request asks for: its size is bounded, and it travels as the other parameters do."""

from __future__ import annotations

import pytest

from qwen_ray.cluster.rank_messages import RANK_CODEC
from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import MAX_GRAMMAR_BYTES, GenerateRequest, Grammar, SamplingParams
from qwen_ray.core.step import NewSequence, StepBatch
from qwen_ray.serving.messages import CODEC, Submit

GRAMMAR = Grammar(kind="json_schema", text='{"type": "object"}', after_thinking=True)


@pytest.mark.parametrize("text", ["x" * (MAX_GRAMMAR_BYTES + 1), "世" * (MAX_GRAMMAR_BYTES // 3 + 1)])
def test_a_long_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="a grammar of the kind regex must have at most 65536 bytes") as caught:
        Grammar(kind="regex", text=text)
    assert caught.value.param == "structured_outputs"


def test_a_text_that_utf_8_cannot_spell_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogates"):
        Grammar(kind="regex", text="a\ud800")


def test_it_travels_to_replicas_and_ranks() -> None:
    sampling = SamplingParams(grammar=GRAMMAR)
    request = GenerateRequest(request_id="r", prompt_token_ids=(1,), sampling=sampling, seed=1)
    submit = Submit(requests=tuple(request.choices()))
    assert CODEC.decode(CODEC.encode(submit)[4:]).requests[0].sampling.grammar == GRAMMAR
    new = NewSequence(sequence_id=1, token_ids=(1,), num_prompt_tokens=1, sampling=sampling, seed=1, stop_token_ids=())
    batch = StepBatch(step_id=1, chunks=(), new=(new,))
    assert RANK_CODEC.decode(RANK_CODEC.encode(batch)[4:]) == batch
