"""One question asked in several ways: by each codec, wherever the cache holds its text, and with
that text computed as one or as modules.

How the answers differ is what the codec or the cache did: `difference` compares them one by one,
since needles that are found all the same are blind to damage.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from longctx.bench.config import VariantsConfig
from longctx.bench.report import Parameter, Result
from longctx.config import EngineConfig, KVCodec
from longctx.needles.scores import mcnemar, wilson

LIKELIEST = 8  # tokens in each place of an answer that variants are compared by
FLOOR = 1e-7  # of a probability: logs are kept to seven digits
Answers = Mapping[Any, Mapping[str, Any]]
"""The records of answers by what was asked; of each, `right`, `given` and `likeliest` are read."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How the cache held the documents that were asked."""

    codec: str
    cache: str
    level: str = ""  # of exactness, where a document is a row of modules

    @property
    def key(self) -> tuple[str, str, str]:
        """What the keys of its records begin with."""
        return self.codec, self.cache, self.level

    @property
    def told(self) -> dict[str, Parameter]:
        """Tell it as results have it."""
        told: dict[str, Parameter] = {"kv_codec": self.codec, "cache": self.cache}
        return told | ({"level": self.level} if self.level else {})

    def __str__(self) -> str:
        return " ".join(filter(None, self.key))


@contextmanager
def stored(
    engine: EngineConfig, variants: VariantsConfig, codec: KVCodec | None
) -> Iterator[EngineConfig]:
    """Yield the configuration of one codec, with a store of its own if one is needed."""
    cache = engine.cache
    if codec is not None:
        cache = replace(cache, kv_codec=codec, force_codec=True)
    if "restored" not in variants.every_cache:
        yield replace(engine, cache=cache)
        return
    # Beside the user's folder if one is named: another disk is another measurement
    with TemporaryDirectory(dir=cache.kv_dir) as scratch:
        yield replace(engine, cache=replace(cache, kv_dir=Path(scratch)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How the same questions came out in another variant.

    `kl` is a lower bound in nats per token: along what both said alike, over the likeliest tokens
    that both named and one more for all others. `flips` is the share of these places where the
    likeliest token differs, which ends the comparison of an answer.
    """

    asked: int
    lost: int
    gained: int
    changed: int  # answers that are not the same text
    places: int
    kl: float
    flips: float

    @property
    def share(self) -> float:
        return (self.gained - self.lost) / self.asked

    @property
    def p(self) -> float:
        return mcnemar(self.lost, self.gained)


def difference(base: Answers, other: Answers) -> Difference:
    """Compare the answers to the same questions; both must have been asked all."""
    pairs = [(answer, other[place]) for place, answer in base.items()]
    places = [place for before, after in pairs for place in _places(before, after)]
    return Difference(
        asked=len(pairs),
        lost=sum(before["right"] and not after["right"] for before, after in pairs),
        gained=sum(after["right"] and not before["right"] for before, after in pairs),
        changed=sum(before["given"] != after["given"] for before, after in pairs),
        places=len(places),
        kl=sum(kl for kl, _ in places) / len(places) if places else 0.0,
        flips=sum(flip for _, flip in places) / len(places) if places else 0.0,
    )


def told_logprobs(likeliest: Iterable[Sequence[tuple[int, float]]]) -> list[list[list[float]]]:
    """Return the likeliest tokens of each place as a record keeps them."""
    return [[[token, round(logprob, 7)] for token, logprob in place] for place in likeliest]


def _places(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[float, bool]]:
    """Yield (KL, flipped) of each place until the likeliest token is another."""
    for first, second in zip(before["likeliest"], after["likeliest"], strict=False):
        flipped = first[0][0] != second[0][0]
        yield _divergence(dict(first), dict(second)), flipped
        if flipped:
            return


def _divergence(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Return KL(first || second) over the tokens that both name, and one for all others."""
    shared = first.keys() & second.keys()
    one, other = ([*(math.exp(logs[token]) for token in shared)] for logs in (first, second))
    one.append(max(FLOOR, 1 - sum(one)))
    other.append(max(FLOOR, 1 - sum(other)))
    total = sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))
    return max(0.0, total)


def difference_results(each: Difference, told: Mapping[str, Parameter]) -> Iterator[Result]:
    """Yield what a difference came to; `told` names the variant and its base."""
    counts = {"n": each.asked, "lost": each.lost, "gained": each.gained, "p": round(each.p, 5)}
    yield Result(metric="difference", value=each.share, unit="share", parameters={**told, **counts})
    yield Result(metric="answers changed", value=each.changed, unit="answers", parameters=told)
    places = {"places": each.places}
    yield Result(
        metric="KL along answers, at least", value=each.kl, unit="nats/token",
        parameters={**told, **places},
    )  # fmt: skip
    yield Result(
        metric="flips along answers", value=each.flips, unit="share", parameters={**told, **places}
    )


def difference_table(answers: Mapping[Variant, Answers], what: str) -> Table:
    """Tell how each variant's answers differ from the first one's; `what` is right or not."""
    base, *others = answers
    caption = (
        f"lost and gained: {what}; p: McNemar's exact test; changed: answers; KL: at least, nats "
        "per token along equal answers; flips: of their tokens"
    )
    table = Table(title=f"Compared with {base}", caption=caption, caption_justify="left")
    for name in ("KV", "found", "95%", "lost", "gained", "p", "changed", "KL", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(str(base), *_found(answers[base]))
    for variant in others:
        each = difference(answers[base], answers[variant])
        table.add_row(
            str(variant),
            *_found(answers[variant]),
            f"{each.lost}",
            f"{each.gained}",
            f"{each.p:.3f}",
            f"{each.changed}",
            f"{each.kl:.1e}",
            f"{each.flips:.1%}",
        )
    return table


def _found(answers: Answers) -> tuple[str, str]:
    right = sum(bool(answer["right"]) for answer in answers.values())
    low, high = wilson(right, len(answers))
    return f"{right} of {len(answers)}", f"{100 * low:.0f} to {100 * high:.0f}"
