"""Whether an answer counts, and how sure a share of right answers is."""

import math
import re
from collections.abc import Sequence

Z = 1.959964  # of the normal distribution, for 95%


def wilson(right: float, asked: int) -> tuple[float, float]:
    """Returns the 95% interval of a share.

    Of scores between 0 and 1 `right` is the sum: they spread less than right and wrong ones do, so
    their interval is no wider.

    Source: Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    share, spread = right / asked, Z * Z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = Z * (share * (1 - share) / asked + spread / (4 * asked)) ** 0.5 / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def matches(given: str, value: str, match: str) -> bool:
    """Tells whether an answer counts: equal, or (`contains`) the value as a word of a sentence."""
    if match == "exact":
        return given.strip() == value
    # 713 is not in 71345, 17.13 or K-713
    return re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w-]|\.\w)", given) is not None


def recall(given: str, wanted: Sequence[str], *, any_answer: bool = False) -> float:
    """Returns RULER's score of an answer: the share of `wanted` in it, whatever their case.

    With `any_answer` one of them is enough (its `string_match_part`; else `string_match_all`).
    Source: https://arxiv.org/abs/2404.06654
    """
    said = "".join("\n" if character < " " else character for character in given).strip().lower()
    found = [each.lower() in said for each in wanted]
    return float(any(found)) if any_answer else sum(found) / len(found)


def mcnemar(lost: int, gained: int) -> float:
    """Returns the exact two-sided p of so many pairs that differ, in one direction and the other.

    Pairs that agree tell nothing. Worked example: 5 lost and none gained is 2 in 32, 0.0625.
    Source: McNemar, 1947, https://doi.org/10.1007/BF02295996
    """
    pairs = lost + gained
    tail = sum(math.comb(pairs, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << pairs))
