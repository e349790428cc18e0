"""What the engine was asked for one HTTP request, and what it took: for metrics, log and traces.

The account of a request is in its context: whoever asks the engine for it adds to it, and who
opened it reads it when the answer has been sent.
"""

import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

from longctx.request import FinishReason, RequestOutput, Usage


@dataclass(slots=True)
class Asked:
    """One question to the engine. Moments are those of `time.perf_counter`."""

    request_id: str
    began: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    usage: Usage | None = None
    finish_reason: FinishReason = FinishReason.ABORT  # until it is another

    def note(self, output: RequestOutput) -> tuple[float, bool] | None:
        """Notes an output; where it has tokens, returns the seconds that were waited for them, and
        whether they are the first."""
        if output.usage is not None:
            self.usage = output.usage
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
        if not output.token_ids:
            return None
        now = time.perf_counter()
        is_first = self.last_token is None
        since = self.began if self.last_token is None else self.last_token
        self.last_token = now
        if is_first:
            self.first_token = now
        return now - since, is_first


@dataclass(slots=True)
class Account:
    """All questions of one HTTP request."""

    asked: list[Asked] = field(default_factory=list)

    def begin(self, request_id: str) -> Asked:
        question = Asked(request_id)
        self.asked.append(question)
        return question

    @property
    def first_token(self) -> float | None:
        """When the first token of any of them came."""
        return min((a.first_token for a in self.asked if a.first_token is not None), default=None)

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Tokens of prompts by where they came from: computed, or the tier that had them."""
        counts: Counter[str] = Counter()
        for asked in self.asked:
            counts.update({} if asked.usage is None else asked.usage.tokens_by_source)
        return dict(counts)

    @property
    def usage(self) -> tuple[int, int, int]:
        """Tokens of prompts, of these those that were cached, and of answers."""
        told = [asked.usage for asked in self.asked if asked.usage is not None]
        return (
            sum(usage.prompt_tokens for usage in told),
            sum(usage.cached_tokens for usage in told),
            sum(usage.completion_tokens for usage in told),
        )


_ACCOUNT: ContextVar[Account | None] = ContextVar("longctx_account", default=None)


def open_account() -> Account:
    """Makes the account of the request that this context handles."""
    account = Account()
    _ACCOUNT.set(account)
    return account


def current_account() -> Account:
    """Returns the account of this context; one that nobody reads where none was opened."""
    return _ACCOUNT.get() or Account()
