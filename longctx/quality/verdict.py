"""Judges what was measured of a codec, of weights or of a level by fixed limits."""

import math
from collections.abc import Iterator

from longctx.engine_info import PARTS, Damage, Limits, Measured, Verdict

MIN_ROWS = 16  # a part with fewer rows is not judged
EARLY = 1.5  # times the interval: what settles a verdict before everything was measured

# A codec that stores 8 bits and more per value has to be lossless in practice; a narrower one,
# which nobody gets without asking for it, may cost about what weights of 5 bits do.
LOSSLESS = Limits(kl=1e-3, flips=0.02, perplexity_rise=0.01)
NARROW = Limits(kl=2e-2, flips=0.10, perplexity_rise=0.03)


def judge(name: str, measured: Measured, limits: Limits, *, vocab_size: int) -> Verdict:
    """Judge the parts that have enough rows, of a text only if the model predicts it at all.

    A text that costs more nats per token than guessing among `vocab_size` tokens is foreign to the
    model: what a codec does to such predictions says nothing.
    """
    text, own = measured.text, measured.own
    foreign = text is not None and text.nats >= math.log(vocab_size)
    parts = {
        part: damage
        for part, damage in (("text", None if foreign else text), ("own", own))
        if damage is not None and damage.rows >= MIN_ROWS
    }
    faults = [fault for part, damage in parts.items() for fault in _faults(part, damage, limits)]
    return Verdict(
        name=name,
        measured=measured,
        limits=limits,
        judged=tuple(parts),
        faults=tuple(faults),
        text_is_foreign=foreign,
    )


def is_settled(verdict: Verdict) -> bool:
    """Whether measuring on would not change the verdict: its intervals are clear of the limits.

    They are widened, since somebody who looks twice is twice as likely to be misled. What passes
    has been judged both as text, unless that is foreign, and in answers.
    """
    limits = verdict.limits
    parts = (verdict.measured.text, verdict.measured.own)
    known = {part: damage for part, damage in zip(PARTS, parts, strict=True) if damage is not None}
    judged = [known[part] for part in verdict.judged]
    if any(each.kl - EARLY * each.kl_error > limits.kl for each in judged):
        return True
    if any(each.flips - EARLY * each.flips_error > limits.flips for each in judged):
        return True
    needed = {"own"} if verdict.text_is_foreign else set(PARTS)
    return (
        verdict.passed
        and needed <= set(verdict.judged)
        and all(each.kl + EARLY * each.kl_error <= limits.kl for each in judged)
    )


def _faults(part: str, damage: Damage, limits: Limits) -> Iterator[str]:
    """Yield what exceeds a limit; not-a-number does, since nothing is known to be within it.

    Changed tokens and perplexity are judged by their means, but not where chance alone may have
    made these: an interval that reaches 0 shows no damage.
    """
    where = PARTS[part]
    if not damage.kl + damage.kl_error <= limits.kl:
        yield (
            f"KL {where} is {damage.kl:.2g} +- {damage.kl_error:.1g} nats, the limit {limits.kl:g}"
        )
    if not (damage.flips <= limits.flips or damage.flips <= damage.flips_error):
        yield (
            f"{damage.flips:.1%} of the likeliest tokens change {where}, the limit is "
            f"{limits.flips:.0%}"
        )
    if not (
        damage.perplexity_rise <= limits.perplexity_rise
        or damage.more_nats <= damage.more_nats_error
    ):
        yield (
            f"perplexity {where} rises by {damage.perplexity_rise:.1%}, the limit is "
            f"{limits.perplexity_rise:.0%}"
        )
