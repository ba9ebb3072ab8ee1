"""When a sequence ends, and what it remembers over a preemption."""

from __future__ import annotations

import pytest

from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from qwen_ray.engine.block_pool import hash_block
from qwen_ray.engine.sequence import Sequence


def sequence(*output: int, max_len: int = 100, earlier: tuple[int, ...] = (), **sampling: int) -> Sequence:
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        output_token_ids=earlier,
        sampling=SamplingParams(**sampling),  # pyright: ignore[reportArgumentType]
        seed=0,
        stop_token_ids=(7, 8),
    )
    seq = Sequence(request, number=0, max_len=max_len, now=5.0)
    seq.token_ids += output
    return seq


@pytest.mark.parametrize(
    ("seq", "reason"),
    [
        (sequence(), None),
        (sequence(max_len=3), None),  # at least one token is generated
        (sequence(4), None),
        (sequence(4, 7), "stop"),
        (sequence(7, 4), None),
        (sequence(4, 8, max_len=5), "stop"),  # a stop token in the last place says more than the place
        (sequence(4, 5, max_len=5), "length"),
        (sequence(7, min_tokens=2), None),
        (sequence(4, 7, min_tokens=2), "stop"),
        (sequence(7, earlier=(4,), min_tokens=2), "stop"),
        (sequence(earlier=(4, 5), max_len=5), "length"),
    ],
)
def test_finish_reason(seq: Sequence, reason: str | None) -> None:
    assert seq.finish_reason == reason


def test_block_hashes_follow_the_tokens() -> None:
    seq = sequence(4)
    assert seq.hashes(2, 2) == [first := hash_block(b"", [1, 2]), hash_block(first, [3, 4])]
    assert seq.hashes(1, 2) == [first]


def test_prompt_logprobs_computed_twice_are_kept_once() -> None:
    seq = sequence(prompt_logprobs=0)
    second, third = (TokenLogprobs(token_id=t, logprob=-1.0) for t in (2, 3))
    seq.add_prompt_logprobs(1, [second])
    seq.leave_ranks()
    seq.add_prompt_logprobs(1, [second, third])
    assert seq.prompt_logprobs == [second, third]


def test_a_continued_request_has_answered_before() -> None:
    assert not sequence(earlier=(4,), prompt_logprobs=0).wants_prompt_logprobs
    assert sequence(prompt_logprobs=0).wants_prompt_logprobs


def test_it_queues_by_priority_then_arrival() -> None:
    assert sequence().arrival == 5.0
    assert sequence().turn == (0, 5.0, 0)
