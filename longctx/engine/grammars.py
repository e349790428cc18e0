"""Keeps answers to a grammar: which tokens may come next, compiled and followed by llguidance.

A grammar is compiled in a thread beside the engine's, which steps on meanwhile; its request is
admitted once that is done. What a step costs then is bounded by the limits below.
"""

from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from torch import Tensor

from longctx.engine.sampler import SamplingError
from longctx.engine.sequence import Sequence
from longctx.errors import InvalidRequest
from longctx.text.tokenizer import Tokenizer

KEPT_GRAMMARS = 32
# Compiling ends within about a second, a step within a few milliseconds, whatever is asked for.
INITIAL_LEXER_FUEL = 2_000_000
STEP_LEXER_FUEL = 100_000
STEP_ITEMS = 30_000
LEXER_STATES = 50_000
GRAMMAR_SYMBOLS = 200_000


class TokenMask:
    """Follows one answer through its grammar; only the engine's thread touches it."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def restrict(self, logits: Tensor) -> None:
        """Set to minus infinity, in place, what may not come next; `logits` [vocab].

        Raises SamplingError where nothing may, or the grammar has become too complex to follow.
        """
        allowed = self.allowed()
        if not allowed.any():
            reason = _short(self.error) or "no token fits"
            raise SamplingError(f"the grammar of the answer cannot be followed further: {reason}")
        barred = torch.ones(len(logits), dtype=torch.bool)
        barred[: self._vocab_size] = torch.from_numpy(~allowed)[: len(logits)]
        logits.masked_fill_(barred.to(logits.device), float("-inf"))

    def allowed(self) -> NDArray[np.bool_]:
        """Return [vocab]: which tokens may come next; none where there is an error."""
        words = np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            words[:] = 0
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self._vocab_size]
        return bits.astype(np.bool_)

    def consume(self, token_id: int) -> None:
        """Go on with a token that was allowed."""
        self._matcher.consume_token(token_id)

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def error(self) -> str:
        """What has gone wrong, or nothing."""
        return str(self._matcher.get_error())

    def fork(self) -> "TokenMask":
        """Return another answer's mask, which continues from here."""
        return TokenMask(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles grammars for sequences that wait for them, one after another in its own thread.

    The engine's thread calls `begin`, `take_done` before each step, and `close` at the end.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        """`vocab_size`: of the model, which may have more tokens than the tokenizer names."""
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._words: LLTokenizer | None = None  # made when it is needed first
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: list[tuple[Sequence, Future[TokenMask]]] = []

    @property
    def busy(self) -> bool:
        """Whether sequences wait for their grammars."""
        return bool(self._waiting)

    def begin(self, sequence: Sequence, grammar: str) -> None:
        """Hold a sequence back until its grammar is compiled."""
        sequence.held = True
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._waiting.append((sequence, self._pool.submit(self._compile, grammar)))

    def take_done(self) -> list[tuple[Sequence, InvalidRequest]]:
        """Let go of the sequences whose grammars are compiled; return those that have failed."""
        failed = []
        for sequence, future in [pair for pair in self._waiting if pair[1].done()]:
            self._waiting.remove((sequence, future))
            error = future.exception()
            if error is None:
                sequence.sampling_state.mask = future.result()
                sequence.held = False
            elif isinstance(error, InvalidRequest):
                failed.append((sequence, error))
            else:
                reason = f"the grammar could not be compiled: {error}"
                failed.append((sequence, InvalidRequest(reason, param="response_format")))
        return failed

    def wait(self, seconds: float) -> None:
        """Wait until a grammar is compiled, but not longer than that."""
        wait([future for _, future in self._waiting], seconds, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """Compile nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> TokenMask:
        """Raises InvalidRequest for a grammar that is none, too large, or that no text follows."""
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._matcher(grammar)
            self._compiled[grammar] = matcher
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return TokenMask(matcher.deep_copy(), self._vocab_size)

    def _matcher(self, grammar: str) -> LLMatcher:
        if self._words is None:
            ends = sorted(self._tokenizer.eos_token_ids)
            self._words = LLTokenizer(
                self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=ends or None
            )
        limits = LLParserLimits(
            initial_lexer_fuel=INITIAL_LEXER_FUEL,
            step_lexer_fuel=STEP_LEXER_FUEL,
            step_max_items=STEP_ITEMS,
            max_lexer_states=LEXER_STATES,
            max_grammar_size=GRAMMAR_SYMBOLS,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._words, grammar, log_level=0, limits=limits)
        first = TokenMask(matcher.deep_copy(), self._vocab_size)
        possible = first.allowed().any()  # also finds what goes wrong at the first token only
        reason = matcher.get_error() or first.error
        if reason or not possible:
            raise InvalidRequest(
                f"the schema or grammar cannot be followed: {_short(reason or 'no text fits it')}; "
                "see docs/openai.md for what can",
                param="response_format",
            )
        return matcher


def _short(reason: str) -> str:
    lines = " ".join(reason.split())
    return lines if len(lines) <= 300 else f"{lines[:300]}..."
