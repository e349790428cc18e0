"""Whether an answer counts, and how sure a share of right answers is."""

import re

Z = 1.959964  # of the normal distribution, for 95%


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Returns the 95% interval of a share.

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
