"""From logits to tokens.

A token depends on (request seed, position, logits) and the request's own tokens, never on batch neighbours or on what
was drawn before: a resumed sequence goes on with the same tokens. Knows no models, blocks or ranks.

Order, as in vLLM: logit_bias, penalties, min_tokens; then temperature, top_k, top_p, min_p. Log-probabilities are of
the model's own distribution, before all of these.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from qwen_ray.core.request import SamplingParams, TokenLogprobs
from qwen_ray.core.step import PromptLogprobs, Sample
from qwen_ray.worker.noise import MAX_GUMBEL, MIN_GUMBEL, gumbel, stream_key
from qwen_ray.worker.prepare import PromptRows, to_tensor
from qwen_ray.worker.sequences import SequenceState

# A token this far below the best one cannot win, whatever the noise: leaving it out changes nothing.
REACH = MAX_GUMBEL - MIN_GUMBEL + 0.01
# Bounds of the memory that is needed beside the logits.
PIECE_ELEMENTS = 2**21  # logits that are drawn from together
PIECE_ROWS = 64  # rows of prompt logits that are described together
MIN_TEMPERATURE = 1e-5  # below it, the same as greedy but for ties


def sample(logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Sample]:
    """One token for each of `states` from its row of `logits` [len(states), vocab] float32, which is overwritten."""
    is_finite = logits.sum(-1).isfinite().tolist()
    wanted = [i for i, state in enumerate(states) if state.sampling.logprobs is not None and is_finite[i]]
    raw = logits[wanted] if wanted else None
    adjust(logits, states)
    token_ids: list[int] = logits.argmax(-1).tolist()
    drawn = [i for i, state in enumerate(states) if not state.sampling.is_greedy and is_finite[i]]
    if drawn:
        rows = logits if len(drawn) == len(states) else logits[drawn]
        for i, token_id in zip(drawn, draw(rows, [states[i] for i in drawn]), strict=True):
            token_ids[i] = token_id
    logprobs: dict[int, TokenLogprobs] = {}
    if raw is not None:
        chosen = [token_ids[i] for i in wanted]
        num_top = [states[i].sampling.logprobs or 0 for i in wanted]
        logprobs = dict(zip(wanted, describe(raw, chosen, num_top), strict=True))
    return [
        Sample(sequence_id=state.sequence_id, token_id=token_ids[i], logprobs=logprobs.get(i))
        if is_finite[i]
        else Sample(sequence_id=state.sequence_id, token_id=0, error="the model's logits are not finite")
        for i, state in enumerate(states)
    ]


def adjust(logits: torch.Tensor, states: Sequence[SequenceState]) -> None:
    """Logit bias, penalties and min_tokens, in place. Rows that ask for none of them cost nothing."""
    _add_bias(logits, states)
    _penalize(logits, states)
    _forbid_stops(logits, states)


def draw(logits: torch.Tensor, states: Sequence[SequenceState]) -> list[int]:
    """A token for each row of `logits` [len(states), vocab], by its temperature and filters."""
    size = max(1, PIECE_ELEMENTS // logits.shape[1])
    return [
        token_id
        for start in range(0, len(states), size)
        for token_id in _draw_piece(logits[start : start + size], states[start : start + size])
    ]


def _draw_piece(logits: torch.Tensor, states: Sequence[SequenceState]) -> list[int]:
    """Gumbel-max: the argmax of `logits / temperature + noise` is a sample of the softmax; filters cut it first."""
    params = [state.sampling for state in states]
    temperature = _column(params, "temperature", logits).clamp_min_(MIN_TEMPERATURE)
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)  # at most 0
    scores, token_ids = candidates(scaled)
    if any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        token_ids = token_ids.gather(-1, order)
        scores = cut(scores, params)
    keys = torch.tensor([[stream_key(state.seed, state.num_tokens)] for state in states], device=logits.device)
    best = (scores + gumbel(keys, token_ids)).argmax(-1, keepdim=True)
    return token_ids.gather(-1, best)[:, 0].tolist()


def candidates(scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each row that noise can lift to the top: (scores float64, ids), both [rows, most candidates].

    Ids ascend; shorter rows are filled up with scores of -inf.
    """
    rows, token_ids = (scaled >= -REACH).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=scaled.shape[0])
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (scaled.shape[0], int(counts.max()))
    scores = torch.full(shape, float("-inf"), dtype=torch.float64, device=scaled.device)
    scores[rows, columns] = scaled[rows, token_ids].double()
    ids = torch.zeros(shape, dtype=torch.int64, device=scaled.device)
    ids[rows, columns] = token_ids
    return scores, ids


def cut(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """-inf for what top_k, then top_p, then min_p leave out of `scores` [rows, n], which descend along each row.

    top_p keeps the fewest tokens whose mass reaches it: those with less than it before them.
    """
    top_k = _column(params, "top_k", scores)
    top_p = _column(params, "top_p", scores)
    min_p = _column(params, "min_p", scores)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill((top_k > 0) & (ranks >= top_k), float("-inf"))
    mass = scores.exp()
    total = mass.cumsum(-1)
    is_out = (top_p < 1.0) & (total - mass >= top_p * total[:, -1:])
    is_out |= mass < min_p * mass[:, :1]
    return scores.masked_fill(is_out, float("-inf"))


def describe(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `token_ids` [rows] and of each row's `num_top` best, from raw logits [rows, vocab]."""
    log_total = logits.logsumexp(-1)
    ids = torch.tensor(token_ids, device=logits.device)
    chosen = (logits.gather(-1, ids[:, None])[:, 0] - log_total).tolist()
    most = min(max(num_top), logits.shape[1])
    values, best = logits.topk(most, dim=-1)
    values_list, best_list = (values - log_total[:, None]).tolist(), best.tolist()
    return [
        TokenLogprobs(
            token_id=token_ids[i],
            logprob=chosen[i],
            top=tuple(zip(best_list[i][:count], values_list[i][:count], strict=True)),
        )
        for i, count in enumerate(num_top)
    ]


def describe_prompts(logits: torch.Tensor, prompts: Sequence[PromptRows]) -> list[PromptLogprobs]:
    """`logits` [L, vocab] holds all rows of the step."""
    described: list[PromptLogprobs] = []
    for prompt in prompts:
        entries: list[TokenLogprobs] = []
        num_top = prompt.state.sampling.prompt_logprobs or 0
        for done in range(0, prompt.count, PIECE_ROWS):
            count = min(PIECE_ROWS, prompt.count - done)
            rows = logits[prompt.row + done : prompt.row + done + count]
            start = prompt.start + done
            entries += describe(rows, prompt.state.token_ids[start : start + count].tolist(), [num_top] * count)
        described.append(
            PromptLogprobs(sequence_id=prompt.state.sequence_id, start=prompt.start, entries=tuple(entries))
        )
    return described


def _add_bias(logits: torch.Tensor, states: Sequence[SequenceState]) -> None:
    entries = [
        (row, token_id, bias)
        for row, state in enumerate(states)
        for token_id, bias in state.sampling.logit_bias.items()
        if 0 <= token_id < logits.shape[1]
    ]
    if entries:
        rows, token_ids, biases = zip(*entries, strict=True)
        at = (torch.tensor(rows, device=logits.device), torch.tensor(token_ids, device=logits.device))
        logits.index_put_(at, torch.tensor(biases, dtype=logits.dtype, device=logits.device), accumulate=True)


def _penalize(logits: torch.Tensor, states: Sequence[SequenceState]) -> None:
    penalized = [i for i, state in enumerate(states) if has_penalty(state.sampling)]
    if not penalized:
        return
    params = [states[i].sampling for i in penalized]
    ids, counts = array("q"), array("q")
    sizes: list[int] = []
    for i in penalized:
        known = states[i].counts
        ids += known.ids
        counts += known.counts
        sizes.append(len(known.ids))
    # Every pair of row and token stands here once.
    owner = torch.repeat_interleave(torch.tensor(sizes)).to(logits.device)
    at = (torch.tensor(penalized, device=logits.device)[owner], to_tensor(ids).to(logits.device))
    times = to_tensor(counts).to(logits.device)
    repetition, presence, frequency = (
        _column(params, name, logits)[owner, 0]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - frequency * times - presence * (times > 0)


def _forbid_stops(logits: torch.Tensor, states: Sequence[SequenceState]) -> None:
    entries = [
        (row, token_id)
        for row, state in enumerate(states)
        if state.num_output_tokens < state.sampling.min_tokens
        for token_id in state.stop_token_ids
        if 0 <= token_id < logits.shape[1]
    ]
    if entries:
        rows, token_ids = zip(*entries, strict=True)
        logits[torch.tensor(rows, device=logits.device), torch.tensor(token_ids, device=logits.device)] = float("-inf")


def has_penalty(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)


def _column(params: Sequence[SamplingParams], name: str, like: torch.Tensor) -> torch.Tensor:
    """One number per row, [rows, 1], on the device and in the dtype of `like`."""
    return torch.tensor([[float(getattr(p, name))] for p in params], dtype=like.dtype, device=like.device)
