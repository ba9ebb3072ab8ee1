"""Which tokens a sequence with a grammar may say next, as a mask over its logits.

Masks are made in a thread of their own while the model computes; rows without a grammar have none. Knows a step's
sequences and their logits; where each of them stands is `grammar_place.py`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from qwen_ray.core.errors import RequestError, RequestFailed
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.worker.grammar_place import GrammarPlace
from qwen_ray.worker.sequences import SequenceState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMasks:
    """Of one step's samples. `rows` have a mask each, in `bits` [len(rows), bytes]: a bit for each token, lowest first.

    `errors`: rows that cannot go on, and why.
    """

    rows: tuple[int, ...]
    bits: torch.Tensor
    errors: dict[int, str]

    def apply(self, logits: torch.Tensor) -> None:
        """-inf in `logits` [rows, vocab] for what is not allowed."""
        if not self.rows:
            return
        forbidden = _unpack(~self.bits, logits.device)[:, : logits.shape[1]]
        if len(self.rows) == len(logits):
            logits.masked_fill_(forbidden, float("-inf"))
        else:
            for row, of_row in zip(self.rows, forbidden, strict=True):
                logits[row].masked_fill_(of_row, float("-inf"))


def _unpack(bits: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[rows, bytes] uint8 as [rows, 8 x bytes] bool on `device`."""
    if device.type == "cpu":  # ten times faster than torch's own operations there
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, bitorder="little").view(np.bool_))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=device)
    return (bits.to(device)[:, :, None] & powers).ne(0).flatten(1)


NO_MASKS = TokenMasks(rows=(), bits=torch.empty(0, 0, dtype=torch.uint8), errors={})


class GrammarMasks:
    """Of one rank, if it samples. `compiler` is None where the checkpoint has no tokenizer."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
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
        made: dict[int, bytearray] = {}
        errors: dict[int, str] = {}
        for row in rows:
            try:
                made[row] = self._mask(states[row])
            except RequestError as error:
                errors[row] = f"The answer cannot follow its grammar any further: {error.message}"
            except Exception as error:  # one sequence's grammar is no reason for a rank to fail
                logger.error("a grammar went wrong", exc_info=error)
                errors[row] = "The grammar went wrong; the log of the rank has the details."
        bits = (
            torch.frombuffer(bytearray().join(made.values()), dtype=torch.uint8).view(len(made), -1)
            if made
            else NO_MASKS.bits
        )
        return TokenMasks(rows=tuple(made), bits=bits, errors=errors)

    def _mask(self, state: SequenceState) -> bytearray:
        """Raises RequestError."""
        if self._compiler is None:
            raise RequestFailed("the checkpoint has no tokenizer.")
        place = state.grammar_place
        if place is None:
            assert state.sampling.grammar is not None
            matcher = self._compiler.matcher(state.sampling.grammar)
            place = state.grammar_place = GrammarPlace(matcher, state.sampling, self._compiler.num_bytes)
        place.add(state.token_ids[state.num_prompt_tokens + place.num_seen :].tolist())
        return place.mask(state.stop_token_ids)
