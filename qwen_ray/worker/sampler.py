"""From logits to tokens.

A token depends on (request seed, position, logits) and the request's own tokens, never on batch neighbours or on what
was drawn before: a resumed sequence goes on with the same tokens. Knows no models, blocks or ranks.

Order, as in vLLM: logit_bias, penalties, min_tokens, grammar; then temperature, top_k, top_p, min_p. Where a thinking
budget is spent, its ending is said whatever these come to. Log-probabilities are of the model's own distribution,
before all.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from qwen_ray.core.request import SamplingParams, TokenLogprobs
from qwen_ray.core.step import PromptLogprobs, Sample
from qwen_ray.kernels import reference
from qwen_ray.worker.grammars import NO_MASKS, TokenMasks
from qwen_ray.worker.noise import gumbel, stream_key
from qwen_ray.worker.prepare import PromptRows, to_tensor
from qwen_ray.worker.sequences import SequenceState

PIECE_ROWS = 64  # rows of prompt logits that are described together: bounds the memory
PIECE_ELEMENTS = {"cpu": 2**16, "cuda": 2**22}  # noise made at a time: what stays in a cache, or fills a GPU
NUM_BEST = 512  # of so many tokens top_k and top_p choose before anything is sorted
MIN_TEMPERATURE = 1e-5  # below it, the same as greedy but for ties


def sample(
    logits: torch.Tensor,
    states: Sequence[SequenceState],
    masks: TokenMasks = NO_MASKS,
    greatest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = reference.greatest,
) -> list[Sample]:
    """One token for each of `states` from its row of `logits` [len(states), vocab], which may be overwritten.

    `greatest` is one of `Kernels`.
    """
    places, finite = greatest(logits)
    token_ids, is_finite = places.tolist(), finite.tolist()
    is_adjusted = masks is not NO_MASKS or any(map(has_adjustment, states))
    if is_adjusted or any(state.sampling.logprobs is not None or not state.sampling.is_greedy for state in states):
        logits = logits.float()
    wanted = [i for i, state in enumerate(states) if state.sampling.logprobs is not None and is_finite[i]]
    raw = logits[wanted] if wanted else None
    if is_adjusted:
        adjust(logits, states)
        masks.apply(logits)
        token_ids = greatest(logits)[0].tolist()
    forced = {i: token for i, state in enumerate(states) if (token := state.forced_token) is not None}
    drawn = [i for i, state in enumerate(states) if not state.sampling.is_greedy and is_finite[i] and i not in forced]
    if drawn:
        rows = logits if len(drawn) == len(states) else logits[drawn]
        for i, token_id in zip(drawn, draw(rows, [states[i] for i in drawn]), strict=True):
            token_ids[i] = token_id
    for i, token_id in forced.items():
        token_ids[i] = token_id
    logprobs: dict[int, TokenLogprobs] = {}
    if raw is not None:
        chosen = [token_ids[i] for i in wanted]
        num_top = [states[i].sampling.logprobs or 0 for i in wanted]
        logprobs = dict(zip(wanted, describe(raw, chosen, num_top), strict=True))
    errors = {i: "the model's logits are not finite" for i in range(len(states)) if not is_finite[i]} | masks.errors
    return [
        Sample(sequence_id=state.sequence_id, token_id=0, error=errors[i])
        if i in errors
        else Sample(sequence_id=state.sequence_id, token_id=token_ids[i], logprobs=logprobs.get(i))
        for i, state in enumerate(states)
    ]


def has_adjustment(state: SequenceState) -> bool:
    """Whether `adjust` may change its row."""
    params = state.sampling
    return bool(params.logit_bias or params.min_tokens) or has_penalty(params)


def adjust(logits: torch.Tensor, states: Sequence[SequenceState]) -> None:
    """Logit bias, penalties and min_tokens, in place. Rows that ask for none of them cost nothing."""
    _add_bias(logits, states)
    _penalize(logits, states)
    _forbid_stops(logits, states)


def draw(logits: torch.Tensor, states: Sequence[SequenceState]) -> list[int]:
    """A token for each row of `logits` [len(states), vocab], by its temperature and filters.

    Gumbel-max: the argmax of `logits / temperature + noise` is a sample of the softmax; filters cut it first.
    """
    params = [state.sampling for state in states]
    temperature = _column(params, "temperature", logits).clamp_min_(MIN_TEMPERATURE)
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)  # at most 0
    words = [stream_key(state.seed, state.num_tokens) for state in states]
    keys = torch.tensor(words, dtype=torch.int32, device=logits.device)
    with one_thread():
        return _choose(scaled, keys, params).tolist()


@contextmanager
def one_thread() -> Iterator[None]:
    """Dozens of small operations follow each other here: as many barriers are ruinous where cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _choose(scaled: torch.Tensor, keys: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Token ids [rows] for `scaled` [rows, vocab], which are 0 at the most."""
    is_cut = [p.top_k > 0 or p.top_p < 1.0 for p in params]
    tokens = torch.empty(len(params), dtype=torch.int64, device=scaled.device)
    for rows, choose in (
        ([i for i, cut in enumerate(is_cut) if not cut], _draw_from_all),
        ([i for i, cut in enumerate(is_cut) if cut], _draw_from_best),
    ):
        if rows:
            own = slice(None) if len(rows) == len(params) else rows
            tokens[own] = choose(scaled[own], keys[own], [params[i] for i in rows])
    return tokens


def _draw_from_all(scaled: torch.Tensor, keys: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Token ids [rows] where there is no top_k and no top_p."""
    if any(p.min_p > 0.0 for p in params):
        scaled = scaled.masked_fill(scaled.exp() < _column(params, "min_p", scaled), float("-inf"))
    num_rows, vocab = scaled.shape
    best = torch.full((num_rows,), float("-inf"), device=scaled.device)
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=scaled.device)
    ids = torch.arange(vocab, dtype=torch.int32, device=scaled.device)
    size = max(1, PIECE_ELEMENTS[scaled.device.type] // num_rows)
    for start in range(0, vocab, size):
        noise = gumbel(keys, ids[start : start + size])
        score, column = noise.add_(scaled[:, start : start + size]).max(-1)
        is_better = score > best
        best = torch.where(is_better, score, best)
        tokens = torch.where(is_better, column + start, tokens)
    return tokens


def _draw_from_best(scaled: torch.Tensor, keys: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Token ids [rows] under top_k and top_p: the best few tokens are nearly always enough, and cheap to find."""
    num_best = min(NUM_BEST, scaled.shape[1])
    scores, ids = scaled.topk(num_best, dim=-1)
    total = scaled.exp().sum(-1, keepdim=True, dtype=torch.float64)
    top_k, top_p = _column(params, "top_k", total), _column(params, "top_p", total)
    reaches = scores.exp().sum(-1, keepdim=True, dtype=torch.float64) >= top_p * total
    is_enough = torch.where(top_k > 0, top_k <= num_best, reaches)
    noisy = cut(scores, total, params) + gumbel(keys, ids.int())
    tokens = ids.gather(-1, noisy.argmax(-1, keepdim=True))[:, 0]
    for row in (~is_enough[:, 0]).nonzero()[:, 0].tolist():
        scores, ids = scaled[row : row + 1].sort(dim=-1, descending=True, stable=True)
        noisy = cut(scores, total[row : row + 1], params[row : row + 1]) + gumbel(keys[row : row + 1], ids.int())
        tokens[row] = ids[0, noisy.argmax()]
    return tokens


def cut(scores: torch.Tensor, total: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """-inf for what top_k, then top_p, then min_p leave out of `scores` [rows, n], which descend from 0 in each row.

    `total` [rows, 1] is the mass of a row's whole vocabulary. top_p keeps the fewest tokens whose mass reaches it:
    those with less than it before them.
    """
    top_k, top_p, min_p = (_column(params, name, total) for name in ("top_k", "top_p", "min_p"))
    is_out = (top_k > 0) & (torch.arange(scores.shape[1], device=scores.device) >= top_k)
    mass = scores.double().exp().masked_fill_(is_out, 0.0)
    reached = mass.cumsum(-1)
    total = torch.where(top_k > 0, reached[:, -1:], total)
    is_out |= (top_p < 1.0) & (reached - mass >= top_p * total)
    is_out |= mass < min_p
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
            rows = logits[prompt.row + done : prompt.row + done + count].float()
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
        if state.num_output_tokens < state.sampling.min_tokens and state.sampling.grammar is None
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
