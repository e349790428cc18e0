"""The demo's real model: SmolLM2, asked about the Python documentation that every Python has.

A page of it is sent along with a question, to a server that has not seen it, that knows it, and
that was stopped and started in between. SmolLM2 has 135 million parameters: it reads and speaks,
and is often wrong. Its answers are printed as they are.
"""

import base64
from collections.abc import Callable
from contextlib import AbstractContextManager
from pydoc_data import topics
from typing import Protocol, TypeVar

from rich.console import Console

MODEL = "smollm2"
TOPICS = "assert break continue del for while with try lambda import".split()  # 6,300 tokens
QUESTIONS = (
    "What does a lambda expression yield?",
    "When is the else clause of a loop executed?",
    "What does the import statement do?",
)
ANSWER_TOKENS = 48

Said = TypeVar("Said", covariant=True)


class Client(Protocol[Said]):
    """What is used of the demo's client; `tour.Demo` is one."""

    def ask(self, content: object, *, max_tokens: int, show: bool) -> Said: ...


def show_chat_model(
    console: Console,
    served: Callable[[], AbstractContextManager[Client[Said]]],
    *,
    show: Callable[[Said], None],
) -> tuple[Said, Said, Said]:
    """Ask the questions; return how the first went cold, warm and restored.

    `served` starts a server of the model on the same store each time; `show` prints what an answer
    took.
    """
    text = page()

    def ask(client: Client[Said], question: str) -> Said:
        console.print(f"\n  [cyan]?[/] {question}\n  [cyan]>[/] ", end="")
        said = client.ask(_about(text, question), max_tokens=ANSWER_TOKENS, show=True)
        console.print()
        show(said)
        return said

    with served() as client:
        cold, warm, *_ = (ask(client, question) for question in (QUESTIONS[0], *QUESTIONS))
    with served() as client:
        restored = ask(client, QUESTIONS[0])
    return cold, warm, restored


def page() -> str:
    """Join some topics of Python's help into one text."""
    return "\n\n".join(topics.topics[topic].strip() for topic in TOPICS)


def _about(text: str, question: str) -> list[dict[str, object]]:
    data = base64.b64encode(text.encode()).decode()
    file = {"filename": "python.txt", "file_data": f"data:text/plain;base64,{data}"}
    return [{"type": "file", "file": file}, {"type": "text", "text": question}]
