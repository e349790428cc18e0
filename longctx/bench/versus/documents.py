"""One document, asked before and after a restart: by longctx's server and by llama.cpp's.

Both get the same messages, the document and a question in each. Between the first half of the
questions before the restart and the second, a chat about something else comes, as it would.
llama.cpp's slot is saved before the restart and restored after it by requests; longctx needs none.
Then some questions are asked again without any cache: answers that differ were changed by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from longctx.bench.haystack import haystacks
from longctx.bench.served.answer import Answer
from longctx.bench.versus.servers import Server, ask, running_server
from longctx.needles.placing import Tokens
from longctx.needles.ruler_tasks import Sentences

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
OTHER_CHAT = "What is a page table? Answer in one sentence."
FRAME_TOKENS = 16  # between the document and the question


@dataclass(slots=True)
class Conversation:
    """What one server's questions took, in their order."""

    tokens: int = 0  # of the longest prompt
    before: list[Answer] = field(default_factory=list)
    after: list[Answer] = field(default_factory=list)
    uncached: dict[int, Answer] = field(default_factory=dict)  # by number, over both halves
    stored_bytes: int = 0
    save_seconds: float = 0.0
    restore_seconds: float = 0.0

    @property
    def cold_seconds(self) -> float:
        return self.before[0].first_token_seconds

    @property
    def warm_seconds(self) -> float:
        """The median of the questions before the restart, but the first; that where it is alone."""
        return median(asked.first_token_seconds for asked in self.before[1:] or self.before)

    @property
    def restored_seconds(self) -> float:
        """The first question after the restart, with what restoring took."""
        return self.restore_seconds + self.after[0].first_token_seconds

    @property
    def same(self) -> int:
        """How many of the questions that were asked again had the same answer without a cache."""
        asked = [*self.before, *self.after]
        return sum(asked[number].text == cold.text for number, cold in self.uncached.items())


def questions_on_text(
    tokens: int,
    count: int,
    *,
    seed: int,
    tokenizer: Tokens,
    sentences: Sentences | None,
) -> list[str]:
    """Return `count` messages of at most `tokens` tokens: one text, then a question on it."""
    per_depth = -(-count // len(DEPTHS))
    longest = 64
    (hay, *_) = haystacks(
        tokens - longest - FRAME_TOKENS,
        DEPTHS,
        questions=per_depth,
        kind="any",
        distractor_count=0,
        seed=seed,
        tokenizer=tokenizer,
        sentences=sentences,
    )
    planted = hay.planted[:count]
    return [f"{hay.text}\n\n{each.needle.question}" for each in planted]


def converse(
    server: Server,
    messages: Sequence[str],
    again: Sequence[int],
    folder: Path,
    *,
    said_tokens: int,
    say: Callable[[str], None],
) -> Conversation:
    """Ask half of the messages, restart, ask the others; then those of `again` without a cache.

    Raises LongctxError where the server fails.
    """
    found = Conversation()
    half = len(messages) // 2
    errors = folder / "errors"
    store = folder / "store"
    store.mkdir(parents=True)
    say(f"{server.name}: {half} questions")
    with running_server(server, store, errors) as address:
        ask(server, address, "Good morning!", max_tokens=2)  # the first answer is always slow
        for number, message in enumerate(messages[:half]):
            if number == half // 2:
                ask(server, address, OTHER_CHAT, max_tokens=said_tokens)
            found.before.append(ask(server, address, message, max_tokens=said_tokens))
        found.save_seconds = server.save(address)
    found.stored_bytes = server.stored_bytes(store)
    say(f"{server.name}: restarted, {len(messages) - half} questions")
    with running_server(server, store, errors) as address:
        ask(server, address, "Good morning!", max_tokens=2)
        found.restore_seconds = server.restore(address)
        for message in messages[half:]:
            found.after.append(ask(server, address, message, max_tokens=said_tokens))
        for place, number in enumerate(again):
            say(f"{server.name}: question {number + 1} without a cache")
            found.uncached[number] = ask(
                server, address, messages[number], max_tokens=said_tokens, cold=place
            )
    asked = (*found.before, *found.after)
    found.tokens = max(each.prompt_tokens or 0 for each in asked)
    return found
