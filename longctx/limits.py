"""How long a prompt and its answer may be: what the model allows, and what memory can hold."""

from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.kv.memory import KVMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLimits:
    max_context_tokens: int  # the model's
    capacity_tokens: int  # tokens of KV that the device pool holds
    longest_tokens: int  # prompt and answer together that can be served
    streamed_answer_tokens: int  # an answer whose prompt is larger than the device

    @classmethod
    def of(
        cls, max_context_tokens: int, memory: KVMemory, *, below_tokens: int = 0
    ) -> "ContextLimits":
        """`below_tokens`: what the largest tier below the device holds. Nothing is streamed through
        a device that does not hold the blocks of one step."""
        capacity = held = memory.capacity_tokens
        if memory.can_stream and memory.capacity_blocks >= memory.step_blocks:
            held = max(capacity, below_tokens)
        return cls(
            max_context_tokens=max_context_tokens,
            capacity_tokens=capacity,
            longest_tokens=min(max_context_tokens, held),
            streamed_answer_tokens=max(0, capacity - memory.step_blocks * BLOCK_TOKENS),
        )

    @property
    def cure(self) -> str:
        """What lets longer ones be served."""
        if self.longest_tokens == self.max_context_tokens:
            return "raise --max-context where the model allows it"
        return "raise --device-pool-gib"

    def answer_tokens(self, prompt_tokens: int) -> int:
        """The longest answer to a prompt of that length.

        Only what is stored can leave the device while it is needed, and answers are not stored.
        """
        beside = max(self.capacity_tokens - prompt_tokens, self.streamed_answer_tokens)
        return max(0, min(self.longest_tokens - prompt_tokens, beside))
