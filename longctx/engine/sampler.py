"""Samples tokens from logits, so that a token depends on its own sequence alone.

The random stream of a sequence is a counter-based generator under its seed, read at the number of
tokens sampled so far, and sampling inverts the distribution in the order of token ids. Neighbors in
the batch, preemption and the device's own generator therefore change nothing. The laws are those
of Hugging Face and vLLM, in the order of `sample`'s docstring.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longctx.errors import LongctxError
from longctx.request import SamplingParams

# Philox makes four 64-bit numbers per tick of its counter; a state fetches this many at once.
NUMBERS_PER_TICK = 4
STREAM_BLOCK = 64

# The filters are found on so many of the likeliest tokens, in order. Where these do not suffice,
# WIDENING times as many are ordered, with the same result: ordering 256 of 150,000 takes 0.4 ms on
# a CPU core, ordering all of them 14 ms.
ORDERED_TOKENS = 256
WIDENING = 16


class SamplingError(LongctxError):
    """Says why a row has no next token; `sample` returns it in the token's place."""


class AnswerMask(Protocol):
    """Says which tokens may come next, and is told which one came."""

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        ...

    def restrict(self, logits: Tensor) -> None:
        """Set the others to minus infinity, in place; raises SamplingError where none is left."""
        ...

    def consume(self, token_id: int) -> None: ...

    def fork(self) -> "AnswerMask": ...


class SamplingState:
    """What sampling remembers of one sequence: its step in the random stream, and its counts.

    `sample` reads the state and changes nothing that shows; the engine calls `observe` with each
    token that it appends, once, and `fork` where the choices of a request part. Only the engine's
    thread touches it.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt_token_ids: Callable[[], np.ndarray],
    ) -> None:
        """Begin at step 0; only a repetition penalty calls `prompt_token_ids`, once."""
        self.params = params
        self.step = 0  # tokens observed
        self.mask: AnswerMask | None = None  # where the answer has to follow a grammar
        self._seed = seed
        self._prompt_token_ids = prompt_token_ids
        self._stream: np.ndarray = np.empty(0)  # uniforms of the block that holds `step`
        self._stream_block: int | None = None
        self._uncounted: list[int] = []
        self._counts: Tensor | None = None  # [vocab] float32, how often each token was output
        self._in_prompt: Tensor | None = None  # [vocab] bool

    @property
    def adjusts_logits(self) -> bool:
        """Whether a bias, a penalty or a grammar changes the sequence's logits (`adjust`)."""
        params = self.params
        return bool(params.logit_bias) or self._counts_output or self.mask is not None

    @property
    def _counts_output(self) -> bool:
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    def observe(self, token_id: int) -> None:
        """Count `token_id` as output; the next token takes the next number of the stream."""
        self.step += 1
        if self.mask is not None:
            self.mask.consume(token_id)
        if self._counts_output:
            self._uncounted.append(token_id)

    def fork(self, seed: int) -> "SamplingState":
        """Return a state with the same past and another seed."""
        other = SamplingState(self.params, seed=seed, prompt_token_ids=self._prompt_token_ids)
        other.step = self.step
        other.mask = None if self.mask is None else self.mask.fork()
        other._uncounted = list(self._uncounted)
        other._counts = None if self._counts is None else self._counts.clone()
        other._in_prompt = self._in_prompt  # never changes
        return other

    def uniform(self) -> float:
        """Return the number in [0, 1) that belongs to this seed and step, with 53 bits."""
        block, offset = divmod(self.step, STREAM_BLOCK)
        if block != self._stream_block:
            generator = np.random.Philox(
                key=self._seed % 2**64, counter=block * STREAM_BLOCK // NUMBERS_PER_TICK
            )
            self._stream = (generator.random_raw(STREAM_BLOCK) >> np.uint64(11)) * 2.0**-53
            self._stream_block = block
        return float(self._stream[offset])

    def adjust(self, logits: Tensor) -> None:
        """Add the bias to `logits` [vocab], apply the penalties, then the grammar, in place.

        Raises SamplingError where the grammar cannot be followed.
        """
        self._adjust(logits)
        if self.mask is not None:
            self.mask.restrict(logits)

    def _adjust(self, logits: Tensor) -> None:
        params = self.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            bias = torch.tensor(list(params.logit_bias.values()), device=logits.device)
            logits.index_add_(0, ids, bias.to(logits.dtype))
        if not self._counts_output:
            return
        counts = self._output_counts(logits)
        if params.repetition_penalty != 1.0:
            seen = (counts > 0) | self._prompt_members(logits)
            penalty = params.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(seen, penalized, logits, out=logits)
        if params.frequency_penalty != 0.0:
            logits.sub_(counts, alpha=params.frequency_penalty)
        if params.presence_penalty != 0.0:
            logits.sub_((counts > 0).to(logits.dtype), alpha=params.presence_penalty)

    def _output_counts(self, logits: Tensor) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
        if self._uncounted:
            ids = torch.tensor(self._uncounted, device=logits.device)
            self._counts.index_add_(0, ids, torch.ones_like(ids, dtype=logits.dtype))
            self._uncounted.clear()
        return self._counts

    def _prompt_members(self, logits: Tensor) -> Tensor:
        if self._in_prompt is None:
            members = np.zeros(len(logits), dtype=bool)
            members[np.asarray(self._prompt_token_ids(), dtype=np.int64)] = True
            self._in_prompt = torch.from_numpy(members).to(logits.device)
        return self._in_prompt


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[int | SamplingError]:
    """Return the next token of each row, or why it has none.

    `logits` [rows, vocab] are float32 and stay unchanged.

    Per row, in this order: logit_bias; repetition penalty over prompt and output; frequency and
    presence penalties over the output; the grammar; temperature (0: the largest logit, of equals
    the smallest id); top_k (ties with the k-th stay); top_p (the fewest likeliest tokens whose
    share reaches it, of equals the smaller ids); min_p relative to the likeliest. Shares are
    float64.
    """
    rows, vocab_size = logits.shape
    assert rows == len(states), f"{rows} rows of logits for {len(states)} sequences"
    results: list[int | SamplingError] = [0] * rows
    adjusted = [row for row, state in enumerate(states) if state.adjusts_logits]
    if adjusted:
        logits = logits.clone()
    refused: set[int] = set()
    for row in adjusted:
        outside = [token for token in states[row].params.logit_bias if not 0 <= token < vocab_size]
        if outside:
            refused.add(row)
            results[row] = SamplingError(
                f"logit_bias names token {outside[0]}; ids go from 0 to {vocab_size - 1}"
            )
            continue
        try:
            states[row].adjust(logits[row])
        except SamplingError as error:
            refused.add(row)
            results[row] = error
    if rows == 0:
        return results
    peaks, likeliest = logits.max(dim=1)  # the first of equals; NaN wins
    sampled = []
    for row, (peak, token) in enumerate(zip(peaks.tolist(), likeliest.tolist(), strict=True)):
        if row in refused:
            continue
        if not np.isfinite(peak):
            results[row] = SamplingError(
                f"the model computed no usable logits (the largest is {peak}); the weights or "
                "the dtype may be unfit, try --dtype float32"
            )
        elif states[row].params.temperature == 0.0:
            results[row] = token
        else:
            sampled.append(row)
    if sampled:
        chosen = logits if len(sampled) == rows else logits[sampled]
        tokens = _sample_rows(chosen, [states[row] for row in sampled])
        for row, token in zip(sampled, tokens, strict=True):
            results[row] = token
    return results


def _sample_rows(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Sample one token of each row of `logits` [rows, vocab], all finite at their largest."""
    tokens = [0] * len(states)
    filtered = [row for row, state in enumerate(states) if _filters(state.params)]
    plain = [row for row, state in enumerate(states) if not _filters(state.params)]
    if plain:
        chosen = [states[row] for row in plain]
        rows = logits if len(plain) == len(states) else logits[plain]
        shares = _shares(rows, rows.amax(dim=1, keepdim=True), chosen)
        for row, token in zip(plain, _invert(shares, chosen), strict=True):
            tokens[row] = token
    width = ORDERED_TOKENS
    while filtered:
        chosen = [states[row] for row in filtered]
        rows = logits if len(filtered) == len(states) else logits[filtered]
        found = _sample_likeliest(rows, chosen, min(width, logits.shape[1]))
        for row, candidate in zip(filtered, found, strict=True):
            tokens[row] = candidate if candidate is not None else 0
        filtered = [row for row, token in zip(filtered, found, strict=True) if token is None]
        width *= WIDENING
    return tokens


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _sample_likeliest(
    logits: Tensor, states: Sequence[SamplingState], width: int
) -> list[int | None]:
    """Sample from the `width` likeliest tokens alone; None where the filters need more."""
    params = [state.params for state in states]
    everything = logits.shape[1]
    values, ids = logits.topk(width, dim=1)  # [rows, width], falling, equals in any order
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)  # equals by id
    shares = _shares(values, values[:, :1], states)
    running = shares.cumsum(dim=1)

    top_ks = [min(entry.top_k or everything, everything) for entry in params]
    top_k = _column(top_ks, logits, torch.int64)
    kth = values.gather(1, top_k.clamp_max(width) - 1)
    kept = (values >= kth).sum(dim=1, keepdim=True)
    top_p = _column([entry.top_p for entry in params], logits)
    mass = running.gather(1, kept - 1)
    unsummed = [
        row for row, entry in enumerate(params) if top_ks[row] == everything and entry.top_p < 1.0
    ]
    if unsummed and width < everything:
        whole = _shares(logits[unsummed], values[unsummed, :1], [states[row] for row in unsummed])
        mass[unsummed] = whole.cumsum(dim=1)[:, -1:]
    # shares 5 3 1 1, top_p=0.85: the running sums 5 8 9 10 fall short of 8.5 twice, so three stay.
    reached = (running < top_p * mass).sum(dim=1, keepdim=True) + 1
    kept = torch.minimum(kept, reached.where(top_p < 1.0, width))
    min_p = _column([entry.min_p for entry in params], logits)
    kept = torch.minimum(kept, (shares >= min_p).sum(dim=1, keepdim=True))

    # Each cut must lie above the last token seen, or equals of it may lie further down.
    last = values[:, -1:]
    certain = (values.gather(1, kept - 1) > last) & ((kth > last) | (top_k == everything))
    certain |= width == everything
    shares *= torch.arange(width, device=logits.device) < kept
    ids, order = ids.sort(dim=1)
    indices = _invert(shares.gather(1, order), states)
    tokens = ids.gather(1, torch.tensor(indices, device=logits.device)[:, None])[:, 0]
    return [
        token if known else None
        for token, known in zip(tokens.tolist(), certain[:, 0].tolist(), strict=True)
    ]


def _shares(logits: Tensor, peaks: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Return float64 [rows, tokens]: what each token weighs if the likeliest weighs 1."""
    shares = logits.double()
    shares -= peaks
    shares /= _column([state.params.temperature for state in states], logits)
    return shares.exp_()


def _invert(shares: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Return the index in each row of `shares` [rows, tokens] that its uniform number picks.

    Shares 2 0 1 1 have the running sums 2 2 3 4; the number 0.5 is the target 2, and the first
    sum above it is that of index 2.

    A running sum from left to right is the same in every batch, as a sum by pairs need not be.
    """
    running = shares.cumsum(dim=1)
    total = running[:, -1:]
    target = _column([state.uniform() for state in states], shares) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # The first index whose running sum exceeds the target; one without a share never is that.
    indices: list[int] = torch.searchsorted(running, target, right=True)[:, 0].tolist()
    return indices


def _column(values: Sequence[float], beside: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=beside.device)[:, None]
