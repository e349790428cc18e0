"""Log-probabilities of tokens, from the logits as the model gave them.

They are told before anything that sampling does to the logits: no bias, penalty, temperature or
filter has a part in them. Rows are taken a few at a time, so that a vocabulary's worth of working
memory is needed for those alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longctx.engine.sampler import SamplingError
from longctx.engine.scheduler import Chunk
from longctx.engine.sequence import Sequence as EngineSequence
from longctx.request import TokenLogprob

ROWS_AT_ONCE = 64


def score(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return how likely each token was by its row of `logits` [tokens, vocab], float32.

    `top`: how many of the likeliest are named. Raises SamplingError for a row that is not finite.
    """
    scored: list[TokenLogprob] = []
    for begin in range(0, len(token_ids), ROWS_AT_ONCE):
        rows = logits[begin : begin + ROWS_AT_ONCE]
        scored += _score_rows(rows, token_ids[begin : begin + ROWS_AT_ONCE], top)
    return scored


@torch.inference_mode()
def _score_rows(logits: Tensor, token_ids: Sequence[int], top: int) -> Iterator[TokenLogprob]:
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    total = logits.logsumexp(dim=1, keepdim=True)  # [rows, 1]
    if not bool(total.isfinite().all()):
        raise SamplingError(
            "the model computed no usable logits, so there are no log-probabilities; the weights "
            "or the dtype may be unfit, try --dtype float32"
        )
    chosen = (logits.gather(1, ids) - total)[:, 0].tolist()
    values, likeliest = logits.topk(min(top, logits.shape[1]), dim=1)
    values -= total
    ordered = (
        tuple(sorted(zip(names, row, strict=True), key=lambda pair: (-pair[1], pair[0])))
        for names, row in zip(likeliest.tolist(), values.tolist(), strict=True)
    )
    return (
        TokenLogprob(token_id=token, logprob=logprob, likeliest=tops)
        for token, logprob, tops in zip(token_ids, chosen, ordered, strict=True)
    )


def score_prompt(chunk: Chunk, logits: Tensor) -> tuple[TokenLogprob, ...] | SamplingError:
    """Return the log-probabilities of the prompt tokens that follow the rows of a scoring chunk, or
    why there are none.

    `logits` [chunk's tokens, vocab]. A prompt of tokens 0 to 9 in chunks of 6 and 4: the first one
    tells of tokens 0 to 6, where token 0 has none, the second one of 7 to 9.
    """
    sequence = chunk.sequence
    blocks, top = sequence.blocks, sequence.request.sampling.prompt_logprobs
    assert top is not None and blocks.fresh_from is not None
    begin, end = blocks.computed, blocks.computed + chunk.num_tokens
    known = blocks.fresh_from  # rows before it were told of before a preemption
    first = () if known else (TokenLogprob(token_id=_tokens(sequence, 0, 1)[0], logprob=None),)
    last = min(end, blocks.prompt_tokens - 1)
    following = _tokens(sequence, known + 1, last + 1)
    try:
        return (*first, *score(logits[known - begin : last - begin], following, top))
    except SamplingError as error:
        return error


def _tokens(sequence: EngineSequence, begin: int, end: int) -> list[int]:
    token_ids: list[int] = sequence.blocks.tokens.slice(begin, end).tolist()
    return token_ids


def sampled_logprobs(
    logits: Tensor, sequences: Sequence[EngineSequence], tokens: Sequence[int | SamplingError]
) -> list[tuple[TokenLogprob, ...]]:
    """Return what each sequence asks for of the token that it has sampled from its row of logits.

    `logits` [sequences, vocab]. It is one element, or none where none is asked for.
    """
    told: list[tuple[TokenLogprob, ...]] = [()] * len(sequences)
    for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
        top = sequence.request.sampling.logprobs
        if top is not None and isinstance(token, int):
            told[row] = tuple(score(logits[row : row + 1], [token], top))
    return told
