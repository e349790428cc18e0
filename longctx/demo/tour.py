"""`make demo`: everything once, for real. A server process, the official client, a long document.

A document is uploaded, read once and asked; texts are computed once and combined. The server is
stopped and started again, and asked once more: one table shows what each took. The model only finds
facts in text; expected and given answers are shown side by side, right or wrong. At the end a model
that speaks, where it is installed, is asked about a real text.
"""

import argparse
import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import openai
import tokenizers
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from longctx.bench.haystack import document
from longctx.demo import chat_model
from longctx.demo.modules import show_library
from longctx.demo.server import own_environment, running_server
from longctx.embedded import model_path
from longctx.errors import ModelRefused
from longctx.model.named import find_model
from longctx.needles.generator import insert
from longctx.options import add_options, read_options

POLL_SECONDS = 0.1
SYSTEM_TOKENS = 2000
BAR_CELLS = 32
TABLE_CELLS = 10


@dataclass(frozen=True, slots=True)
class Fact:
    statement: str
    question: str
    answer: str


# Change them as you like: the document is written when the demo runs.
FACTS = (
    Fact(
        "The gate number of the crane in Belgrade is 5964.",
        "What is the gate number of the crane in Belgrade?",
        "5964",
    ),
    Fact(
        "As for the northern observatory, its access key is T-712.",
        "What is the access key of the northern observatory?",
        "T-712",
    ),
    Fact(
        "The founder of the stone bridge is Julia Diaz.",
        "What is the founder of the stone bridge?",
        "Julia Diaz",
    ),
)
OTHER_FACT = Fact(
    "The opening date of the harbour museum is 14 May 1987.",
    "What is the opening date of the harbour museum?",
    "14 May 1987",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    model: Annotated[Path | None, "Hugging Face model folder; the embedded model if absent"] = None
    out: Annotated[Path, "folder for the picture and figures of the needle grid"] = Path("out/demo")
    document_tokens: Annotated[int, "length of the documents"] = 32_768
    threads: Annotated[int, "CPU threads of the engine; the embedded model is small"] = 1

    def __post_init__(self) -> None:
        if self.document_tokens < 1024:
            raise ValueError(f"document_tokens={self.document_tokens} must be at least 1024")


@dataclass(frozen=True, slots=True)
class Said:
    """A streamed answer; seconds from the request to its first text."""

    text: str
    first_token_seconds: float
    prompt_tokens: int
    cached_tokens: int
    disk_tokens: int  # of those cached
    waited_tokens: int  # cached, but only because the upload computed them meanwhile
    prompt_cache: dict[str, Any]  # how modules were used, where there are any


class Demo:
    """The client's side: uploads, questions and schemas, through the official client.

    Every call waits for its answer; `model` is the one that the server names.
    """

    def __init__(self, console: Console, client: openai.OpenAI) -> None:
        self.console = console
        self.client = client
        self.model = client.models.list().data[0].id

    def upload(self, name: str, text: str) -> str:
        """Sends a document, shows how far it has been read, and returns its file id once it is."""
        file = self.client.files.create(file=(name, text.encode()), purpose="user_data")
        with Progress(
            TextColumn("  {task.fields[state]:<10}"),
            BarColumn(BAR_CELLS, complete_style="cyan", finished_style="cyan"),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} tokens", style="dim"),
            TimeElapsedColumn(),
            console=self.console,
        ) as progress:
            bar = progress.add_task("", total=None, state="queued")
            while True:
                state = _reading(file)
                progress.update(
                    bar,
                    total=state["tokens"],
                    completed=state["prefilled_tokens"],
                    state=state["state"],
                )
                if state["state"] == "ready":
                    return file.id
                if state["state"] == "error":
                    raise SystemExit(f"longctx demo: the document failed: {state['error']}")
                time.sleep(POLL_SECONDS)
                file = self.client.files.retrieve(file.id)

    def ask(
        self,
        content: Any,
        *,
        system: str | None = None,
        prompt_cache: dict[str, Any] | None = None,
        max_tokens: int = 64,
        show: bool = False,
    ) -> Said:
        """Asks one streamed chat request; `show` prints the words as they come."""
        messages: list[Any] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text, first = "", 0.0
        usage, found = None, None
        modules: dict[str, Any] = {}
        begins = {} if prompt_cache is None else {"prompt_cache": prompt_cache}
        began = time.perf_counter()
        for chunk in self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cache_explain": True, **begins},
        ):
            usage = chunk.usage or usage
            found = (chunk.model_extra or {}).get("cache_explain", found)
            modules = (chunk.model_extra or {}).get("prompt_cache", modules)
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                first = first or time.perf_counter() - began
                text += piece
                if show:
                    self.console.print(piece, end="", style="bold", markup=False, highlight=False)
        assert usage is not None and usage.prompt_tokens_details is not None and found is not None
        return Said(
            text,
            first or time.perf_counter() - began,
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens or 0,
            found["matched_tokens"]["disk"],
            found["waited_for_tokens"],
            modules,
        )

    def store(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Stores a prompt schema and returns its object once its modules are computed."""
        path = "/prompt_cache/schemas"
        stored: dict[str, Any] = self.client.post(path, body=schema, cast_to=dict[str, Any])
        while stored["state"] not in ("ready", "error"):
            time.sleep(POLL_SECONDS)
            stored = self.client.get(f"{path}/{stored['name']}", cast_to=dict[str, Any])
        if stored["state"] == "error":
            raise SystemExit(f"longctx demo: the schema failed: {stored['error']}")
        return stored


def main(words: Sequence[str] | None = None) -> None:
    """Runs the tour. Ends by SystemExit when something fails; a wrong answer is no failure."""
    parser = argparse.ArgumentParser(prog="python -m longctx.demo", description=__doc__)
    add_options(parser, DemoConfig)
    arguments = parser.parse_args(words)
    config = read_options(arguments, DemoConfig, environment={}, file=arguments.config)
    folder = config.model or model_path()
    if not (folder / "config.json").is_file():
        raise SystemExit(
            f"longctx demo: there is no model in {folder}; install longctx with its embedded "
            "models, or give a model folder with --model"
        )
    console = Console(highlight=False)
    began = time.monotonic()
    try:
        with TemporaryDirectory(prefix="longctx-demo-") as store:
            _story(console, config, folder, Path(store))
        _needle_grid(console, config, folder)
        if config.model is None:  # else the tour is of the model that was given, alone
            with TemporaryDirectory(prefix="longctx-demo-") as store:
                _chat_model(console, Path(store))
    except openai.OpenAIError as error:
        raise SystemExit(f"longctx demo: the server answered with an error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    console.print(f"\n[bold]Done[/] in {time.monotonic() - began:.0f} s.")


def _story(console: Console, config: DemoConfig, folder: Path, store: Path) -> None:
    encode = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode

    def count(text: str) -> int:
        return len(encode(text, add_special_tokens=False).ids)

    report = _written(config.document_tokens, FACTS, seed=1, count=count)
    other = _written(config.document_tokens, (OTHER_FACT,), seed=2, count=count)

    _section(console, "A server starts", "longctx serve, in a process of its own")
    with _served(console, config, folder, store) as demo:
        _section(
            console,
            "A document is uploaded and read, once",
            f"{count(report):,} tokens, {len(report) // 1000:,} kB of text with three facts in it",
        )
        file_id = demo.upload("report.txt", report)

        _section(console, "Three questions about it", "each computes no more than the question")
        for fact in FACTS:
            _question(demo, file_id, fact)

        _section(
            console,
            "Another document, that the server has not seen",
            "sent along with a question, twice: the first time it is read, the second time known",
        )
        cold, warm = (_about_text(demo, other, OTHER_FACT) for _ in range(2))

        _section(console, "A long system prompt, used by two chats", "nothing was set up for it")
        _shared_system_prompt(demo, document(SYSTEM_TOKENS, seed=3, count_tokens=count))

        _section(
            console,
            "A library of texts, used in any combination",
            "a prompt schema: each text is computed once, whatever stands beside it",
        )
        show_library(
            console,
            store=demo.store,
            ask=lambda words, chosen: demo.ask(words, prompt_cache=chosen),
            count=count,
        )

        _section(console, "The server is stopped, and started again", "all it has is on the disk")

    with _served(console, config, folder, store) as demo:
        console.print()
        _question(demo, file_id, FACTS[-1])
        restored = _about_text(demo, other, OTHER_FACT)
        _section(
            console,
            "Time to the first token",
            f"the same question about the other document: {OTHER_FACT.question}",
        )
        _compare(console, cold, warm, restored)
        console.print()


def _chat_model(console: Console, store: Path) -> None:
    _section(
        console,
        "A model that speaks",
        "SmolLM2-135M from its GGUF file reads a page of the Python documentation; it is small, "
        "and often wrong",
    )
    try:
        found = find_model(Path(chat_model.MODEL))
    except ModelRefused as error:
        console.print(f"  left out: {error}")
        return
    cold, warm, restored = chat_model.show_chat_model(
        console,
        lambda: _serving(console, ["--model", str(found)], store),
        show=lambda said: _figures(console, said),
    )
    errors = (store / "errors.log").read_text(encoding="utf-8").splitlines()
    stored = next((line for line in errors if line.startswith("longctx stores KV")), "")
    console.print(f"\n  {stored}", markup=False)
    _section(console, "Time to the first token", f"the same question: {chat_model.QUESTIONS[0]}")
    _compare(console, cold, warm, restored)


def _served(
    console: Console, config: DemoConfig, folder: Path, store: Path
) -> AbstractContextManager[Demo]:
    return _serving(console, _engine_options(config, folder), store)


@contextmanager
def _serving(console: Console, options: Sequence[str], store: Path) -> Iterator[Demo]:
    words = ["--store-dir", str(store / "store"), *options]
    with (
        running_server(console, words, errors=store / "errors.log") as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600
        ) as client,
    ):
        yield Demo(console, client)


def _question(demo: Demo, file_id: str, fact: Fact) -> None:
    console = demo.console
    console.print(f"  [cyan]?[/] {fact.question}")
    console.print("  [cyan]>[/] ", end="")
    said = demo.ask(_about({"file_id": file_id}, fact.question), show=True)
    console.print()
    _verdict(console, said.text, fact.answer)
    _figures(console, said)
    console.print()


def _figures(console: Console, said: Said) -> None:
    console.print(
        f"    first token after {_duration(said.first_token_seconds)}, "
        f"{said.cached_tokens:,} of {said.prompt_tokens:,} prompt tokens were cached",
        style="dim",
    )


def _about_text(demo: Demo, text: str, fact: Fact) -> Said:
    """Sends the text along with the question, as a client that knows nothing of uploads does."""
    data = base64.b64encode(text.encode()).decode()
    file = {"filename": "other.txt", "file_data": f"data:text/plain;base64,{data}"}
    said = demo.ask(_about(file, fact.question))
    demo.console.print(f"  [cyan]?[/] {fact.question}\n  [cyan]>[/] [bold]{said.text.strip()}[/]")
    _verdict(demo.console, said.text, fact.answer)
    return said


def _compare(console: Console, cold: Said, warm: Said, restored: Said) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "first token", "computed", "from memory", "from disk", "sooner", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for label, said, color in (
        ("cold", cold, "yellow"),
        ("warm", warm, "cyan"),
        ("restored", restored, "green"),
    ):
        share = said.first_token_seconds / cold.first_token_seconds
        table.add_row(
            label,
            _duration(said.first_token_seconds),
            f"{said.prompt_tokens - said.cached_tokens + said.waited_tokens:,}",
            f"{said.cached_tokens - said.disk_tokens - said.waited_tokens:,}",
            f"{said.disk_tokens:,}",
            f"{1 / share:,.0f} x",
            f"[{color}]{'━' * min(max(1, round(TABLE_CELLS * share)), TABLE_CELLS)}[/]",
        )
    console.print(Padding(table, (0, 0, 0, 2)))


def _shared_system_prompt(demo: Demo, system: str) -> None:
    for number, words in enumerate(("Who are you?", "What can you do for me today?"), start=1):
        said = demo.ask(words, system=system)
        demo.console.print(
            f"  chat {number}  first token after {_duration(said.first_token_seconds):>7}  "
            f"[dim]{said.cached_tokens:,} of {said.prompt_tokens:,} prompt tokens were cached[/]"
        )


def _needle_grid(console: Console, config: DemoConfig, folder: Path) -> None:
    _section(console, "A needle grid", "longctx bench niah: one fact, at every depth and length")
    words = ["--lengths", "4096,16384,32768", "--questions", "4", "--out", str(config.out)]
    words += _engine_options(config, folder)
    # A tour that was left halfway begins anew
    (config.out / "niah.part.jsonl").unlink(missing_ok=True)
    with console.status("  asking 60 questions", spinner_style="cyan"):
        bench = subprocess.run(
            [sys.executable, "-P", "-m", "longctx", "bench", "niah", *words],
            env=own_environment(),
            capture_output=True,
            text=True,
        )
    if bench.returncode:
        raise SystemExit(f"longctx demo: the needle grid failed: {bench.stderr.strip()[-2000:]}")
    *table, record = bench.stdout.rstrip().splitlines()
    for line in table:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    total = json.loads(record)["results"][0]
    console.print(
        f"\n  [bold]{total['value']:.0%}[/] of {total['n']} found "
        f"(95% interval {total['low']:.0%} to {total['high']:.0%})"
    )


def _written(tokens: int, facts: Sequence[Fact], *, seed: int, count: Callable[[str], int]) -> str:
    """Returns a document of about `tokens` tokens with the facts spread over it."""
    depths = [(2 * number + 1) / (2 * len(facts)) for number in range(len(facts))]
    filler = document(tokens, seed=seed, count_tokens=count)
    return insert(filler, [fact.statement for fact in facts], depths)


def _about(file: dict[str, str], question: str) -> list[dict[str, Any]]:
    return [{"type": "file", "file": file}, {"type": "text", "text": question}]


def _reading(file: openai.types.FileObject) -> dict[str, Any]:
    """Returns longctx's own part of a file object, which says how far it has been read."""
    state: dict[str, Any] = (file.model_extra or {})["longctx"]
    return state


def _verdict(console: Console, given: str, expected: str) -> None:
    if given.strip() == expected:
        console.print("    [green]as expected[/]")
    else:
        console.print(f"    [red]wrong[/], the document says: {expected}")


def _section(console: Console, title: str, remark: str) -> None:
    console.print(f"\n[bold]{title}[/]\n[dim]{remark}[/]\n")


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _engine_options(config: DemoConfig, folder: Path) -> list[str]:
    return ["--model", str(folder), "--threads", str(config.threads)]
