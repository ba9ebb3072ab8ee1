"""Which tokens a sequence with a grammar may say next, as a mask over its logits.

Masks are made in a thread of their own while the model computes; rows without a grammar have none. Knows a step's
sequences and their logits; where each of them stands is `grammar_place.py`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from qwen_ray.core.errors import RequestError, RequestFailed
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.worker.grammar_place import GrammarPlace
from qwen_ray.worker.sequences import SequenceState

NUM_KEPT = 64  # masks, unpacked: within strings, say, they are the same again and again

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMasks:
    """Of one step's samples, over logits [rows, vocab]. What is told is whichever is less: most masks allow a handful
    of tokens, or all but a few thousand. Places are row x vocab + token, int64.

    `emptied` rows may say what is at `kept`, and nothing else. `forbidden` is the rest of it. `errors`: rows that
    cannot go on, and why.
    """

    emptied: torch.Tensor
    kept: torch.Tensor
    forbidden: torch.Tensor
    errors: dict[int, str]

    def apply(self, logits: torch.Tensor) -> None:
        """-inf in `logits`, which are contiguous, for what is not allowed."""
        places = logits.view(-1)
        if len(self.emptied):
            kept = self.kept.to(logits.device)
            values = places[kept]
            logits.index_fill_(0, self.emptied.to(logits.device), float("-inf"))
            places[kept] = values
        if len(self.forbidden):
            places.index_fill_(0, self.forbidden.to(logits.device), float("-inf"))


@lru_cache(maxsize=NUM_KEPT)
def _told(bits: bytes, vocab_size: int) -> tuple[bool, npt.NDArray[np.int64]]:
    """Whether the tokens told of are the allowed ones, and which they are."""
    unpacked = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=vocab_size, bitorder="little")
    allowed = unpacked.view(np.bool_)
    is_few = bool(np.count_nonzero(allowed) * 2 < vocab_size)
    return is_few, np.flatnonzero(allowed if is_few else ~allowed)


def to_masks(rows: Mapping[int, bytearray], vocab_size: int, errors: dict[int, str]) -> TokenMasks:
    """`rows`: by row, a bit for each token id."""
    emptied: list[int] = []
    kept: list[npt.NDArray[np.int64]] = []
    forbidden: list[npt.NDArray[np.int64]] = []
    for row, bits in rows.items():
        is_few, ids = _told(bytes(bits), vocab_size)
        (kept if is_few else forbidden).append(ids + row * vocab_size)
        emptied += [row] * is_few
    return TokenMasks(
        emptied=torch.tensor(emptied, dtype=torch.int64),
        kept=_joined(kept),
        forbidden=_joined(forbidden),
        errors=errors,
    )


def _joined(places: list[npt.NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(places)) if places else torch.empty(0, dtype=torch.int64)


NO_MASKS = to_masks({}, 0, {})


class GrammarMasks:
    """Of one rank, if it samples. `compiler` waits for one; it gives None where the checkpoint has no tokenizer."""

    def __init__(self, compiler: Callable[[], GrammarCompiler | None]) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")

    def start(self, states: Sequence[SequenceState]) -> Future[TokenMasks]:
        """For the next token of each of `states`, which must not change until it is done."""
        rows = [row for row, state in enumerate(states) if state.sampling.grammar is not None]
        if rows:
            return self._thread.submit(self._make, states, rows)
        done: Future[TokenMasks] = Future()
        done.set_result(NO_MASKS)
        return done

    def _make(self, states: Sequence[SequenceState], rows: Iterable[int]) -> TokenMasks:
        compiler = self._compiler()
        made: dict[int, bytearray] = {}
        errors: dict[int, str] = {}
        for row in rows:
            try:
                made[row] = _mask(compiler, states[row])
            except RequestError as error:
                errors[row] = f"The answer cannot follow its grammar any further: {error.message}"
            except Exception as error:  # one sequence's grammar is no reason for a rank to fail
                logger.error("a grammar went wrong", exc_info=error)
                errors[row] = "The grammar went wrong; the log of the rank has the details."
        return to_masks(made, 0 if compiler is None else compiler.vocab_size, errors)


def _mask(compiler: GrammarCompiler | None, state: SequenceState) -> bytearray:
    """Raises RequestError."""
    if compiler is None:
        raise RequestFailed("the checkpoint has no tokenizer.")
    place = state.grammar_place
    if place is None:
        assert state.sampling.grammar is not None
        matcher = compiler.matcher(state.sampling.grammar)
        place = state.grammar_place = GrammarPlace(matcher, state.sampling, compiler.num_bytes)
    place.add(state.token_ids[state.num_prompt_tokens + place.num_seen :].tolist())
    return place.mask(state.stop_token_ids)
