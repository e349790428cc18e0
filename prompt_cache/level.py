"""How exactly a prompt made of modules is computed: what is reused, and what is computed again.

    exact     no module is reused: the prompt is computed as plain text, but for ordinary prefixes
    link:16   the first 16 tokens of each module are computed in the prompt, the rest is reused
    modular   modules are reused whole, as each was computed alone

Source: EPIC (LegoLink), https://arxiv.org/abs/2410.15332, for `link`; Prompt Cache,
https://arxiv.org/abs/2311.04934, for `modular`.
"""

import re
from dataclasses import dataclass

from prompt_cache.errors import SchemaError

_LINK = re.compile(r"link:([1-9][0-9]{0,6})")


@dataclass(frozen=True, slots=True)
class Level:
    """How many tokens of each module are computed in the prompt, or None for all of them."""

    link_tokens: int | None

    @property
    def name(self) -> str:
        """The level as requests and options write it."""
        match self.link_tokens:
            case None:
                return "exact"
            case 0:
                return "modular"
            case tokens:
                return f"link:{tokens}"


EXACT = Level(None)
MODULAR = Level(0)


def parse_level(text: str, *, param: str) -> Level:
    """Return the level of that name. Raises SchemaError for any other text.

    `param` is the field or option that the text comes from.
    """
    if text == EXACT.name:
        return EXACT
    if text == MODULAR.name:
        return MODULAR
    if (link := _LINK.fullmatch(text)) is not None:
        return Level(int(link[1]))
    raise SchemaError(
        f"{param} is {text!r}; choose exact, modular, or link:K, which computes the first K tokens "
        "of each module again (such as link:16)",
        param=param,
    )
