"""`longctx bench ruler`: scores, prompts of one BOS, the same answers in process and over HTTP."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from longctx.bench.config import AskedConfig, BenchConfig, FillerConfig, RulerConfig
from longctx.bench.retrieval.journal import Journal
from longctx.bench.retrieval.ruler import measure
from longctx.bench.retrieval.subject import LocalSubject, Said, ServerSubject, Subject
from longctx.bench.retrieval.texts import TextFiller
from longctx.cli import main
from longctx.commands.bench import _without_key
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.embedded import model_path
from longctx.errors import InvalidRequest, LongctxError
from longctx.llm import LLM
from longctx.needles.ruler_tasks import TASKS
from longctx.needles.scores import recall
from longctx.request import Request
from tests.api.live_server import LiveServer

SMALL = RulerConfig(tasks="niah_single_2,niah_multikey_2,vt", prompt_lengths="1024,1500", samples=2)


@pytest.mark.parametrize(
    ("given", "wanted", "any_answer", "score"),
    [
        ("The numbers are 12, 34 and 56.", ("12", "34", "56", "78"), False, 0.75),
        ("AMBER harbor", ("amber", "HARBOR"), False, 1.0),
        ("nothing", ("12",), False, 0.0),
        ("", ("12",), False, 0.0),
        ("1 2", ("12",), False, 0.0),
        ("123", ("12",), False, 1.0),  # a substring, as the paper counts
        ("in 1999", ("1998", "1999"), True, 1.0),
        ("in 1997", ("1998", "1999"), True, 0.0),
        ("two\x00lines", ("two\nlines",), False, 1.0),
    ],
)
def test_scores_are_the_papers(
    given: str, wanted: tuple[str, ...], any_answer: bool, score: float
) -> None:
    assert recall(given, wanted, any_answer=any_answer) == score


def local(folder: Path | None) -> LLM:
    return LLM(
        config=EngineConfig(
            model=ModelConfig(model=folder, threads=1),
            cache=CacheConfig(kv_codec="raw", device_pool_gib=0.1),
        )
    )


def submitted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that reach the engine from now on."""
    seen: list[Request] = []
    submit = llm.engine.submit

    def spy(request: Request) -> None:
        seen.append(request)
        submit(request)

    monkeypatch.setattr(llm.engine, "submit", spy)
    return seen


def quiet(_: str) -> None:
    pass


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "ruler.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_prompt_has_one_bos_the_models_template_and_the_length_that_was_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local(model) as llm:
        seen = submitted(llm, monkeypatch)
        subject = LocalSubject(llm)
        measure(subject, BenchConfig(out=tmp_path), FillerConfig(), SMALL, say=quiet)
        tokenizer = llm.engine.tokenizer
    run, *records = lines(tmp_path)
    assert run["run"]["model"] == model.name
    assert len(records) == len(seen) == 12
    for record, request in zip(records, seen, strict=True):
        ids = [token for segment in request.segments for token in segment.token_ids]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        text = tokenizer.decode(ids, skip_special=False)
        assert text.startswith("<s><|user|>") and text.endswith("<|assistant|>")
        task, length, _ = record["key"]
        room = length - TASKS[task].answer_tokens
        assert room - 100 < len(ids) <= room
        assert record["counted_tokens"] == record["prompt_tokens"] == len(ids)


def test_the_embedded_model_answers_and_its_answers_end_at_the_stop(tmp_path: Path) -> None:
    ruler = RulerConfig(tasks="niah_single_1,niah_multikey_3", prompt_lengths="1024", samples=1)
    with local(model_path()) as llm:
        measure(LocalSubject(llm), BenchConfig(out=tmp_path), FillerConfig(), ruler, say=quiet)
    for record in lines(tmp_path)[1:]:
        assert record["given"] == record["wanted"][0] and record["score"] == 1.0
        assert record["finish_reason"] == "stop"


def test_a_server_and_the_engine_in_process_give_the_same(model: Path, tmp_path: Path) -> None:
    with LiveServer(model, tmp_path / "store", api_key=("secret",)) as server:
        subject = ServerSubject(f"{server.url}/v1", "secret")
        assert subject.counting == "the server's tokenizer, in its chat template"
        out = BenchConfig(out=tmp_path / "server")
        over_http = measure(subject, out, FillerConfig(), SMALL, say=quiet)
        config = server.engine_config
        with pytest.raises(LongctxError, match="answered 401"):
            ServerSubject(server.url)
    with LLM(config=config) as llm:
        out = BenchConfig(out=tmp_path / "local")
        in_process = measure(LocalSubject(llm), out, FillerConfig(), SMALL, say=quiet)
    told = ("key", "score", "given", "counted_tokens", "prompt_tokens", "finish_reason")
    first, second = (
        [[record[name] for name in told] for record in lines(tmp_path / where)[1:]]
        for where in ("server", "local")
    )
    assert first == second
    values = [
        [(row.metric, row.value, row.parameters.get("n")) for row in report.results]
        for report in (over_http, in_process)
    ]
    assert values[0] == values[1]
    assert "+" not in str(over_http.tables[0])


class Echo:
    """A subject without a model: it says the beginning of what it was asked, and can be cut off."""

    counting = "words"

    def __init__(self, limit: int | None = None) -> None:
        self.parameters = {"model": "echo"}
        self.asked: list[str] = []
        self.limit = limit

    def count(self, text: str) -> int:
        return len(text.split())

    def ask(self, text: str, max_tokens: int) -> Said:
        if len(self.asked) == self.limit:
            raise LongctxError("the line is dead")
        self.asked.append(text)
        return Said(
            text=text[:500], finish_reason="length", prompt_tokens=None, cached_tokens=None,
            seconds=0.5,
        )  # fmt: skip


def echoed(subject: Subject, out: Path | None, ruler: RulerConfig = SMALL, seed: int = 0) -> Any:
    return measure(subject, BenchConfig(out=out, seed=seed), FillerConfig(), ruler, say=quiet)


def test_an_interrupted_run_goes_on_and_comes_to_the_same(tmp_path: Path) -> None:
    whole = Echo()
    expected = echoed(whole, None).results
    with pytest.raises(LongctxError, match="dead"):
        echoed(first := Echo(limit=5), tmp_path)
    with (tmp_path / "ruler.part.jsonl").open("a") as stream:
        stream.write('{"key":["vt",1024,0],"sco')  # cut short by a crash
    with pytest.raises(LongctxError, match="dead"):
        echoed(second := Echo(limit=3), tmp_path)
    third = Echo()
    longer = replace(SMALL, samples=3)
    assert echoed(third, tmp_path, longer).results != expected
    assert set(first.asked + second.asked + third.asked) > set(whole.asked)
    assert len(third.asked) == 18 - 5 - 3  # what was asked is not asked again


def test_a_run_that_came_to_its_end_is_not_gone_on_with(tmp_path: Path) -> None:
    echoed(Echo(), tmp_path)
    assert not (tmp_path / "ruler.part.jsonl").exists() and len(lines(tmp_path)) == 13
    again = Echo()
    echoed(again, tmp_path, seed=1)
    assert len(again.asked) == 12 and lines(tmp_path)[0]["run"]["seed"] == 1


def test_answers_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(LongctxError, match="dead"):
        echoed(Echo(limit=5), tmp_path)
    with pytest.raises(InvalidRequest, match="seed was 0 and is 1; delete it, or choose another"):
        echoed(Echo(), tmp_path, seed=1)
    (tmp_path / "ruler.part.jsonl").write_text("not JSON\n")
    with pytest.raises(InvalidRequest, match="holds no answers of a run"):
        echoed(Echo(), tmp_path)


def test_a_journal_keeps_every_character(tmp_path: Path) -> None:
    for number in range(3):
        journal = Journal(tmp_path, "a", {"seed": 1})
        assert len(journal.records) == number
        journal.add(("größe\u2028", number), {"given": "\u2028 \n \x85 ß \r"})
        journal.close()


def test_a_length_that_is_too_short_for_a_task_is_refused_with_the_one_it_needs() -> None:
    with pytest.raises(InvalidRequest, match=r"cwe needs prompts of [\d,]+ tokens, not 1,024"):
        echoed(Echo(), None, RulerConfig(tasks="cwe", prompt_lengths="1024", samples=1))


def test_haystacks_are_made_of_the_users_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for number, place in enumerate(("a.txt", "inner/b.md")):
        text = " ".join(f"Sentence {number} {each} is here." for each in range(40))
        (folder / place).write_text(text)
    subject = Echo()
    ruler = RulerConfig(tasks="niah_single_2", prompt_lengths="400", samples=2)
    measure(subject, BenchConfig(), FillerConfig(haystack=folder), ruler, say=quiet)
    for prompt in subject.asked:
        assert len(set(re.findall(r"Sentence \d \d+ is here\.", prompt))) >= 40
    assert TextFiller(folder).digest != TextFiller(folder / "a.txt").digest
    with pytest.raises(InvalidRequest, match="cannot read"):
        TextFiller(tmp_path / "missing.txt")


class Handler(BaseHTTPRequestHandler):
    """A server that counts words; `tokenize` says which of the ways to count it knows."""

    tokenize = "none"
    frame = 7

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.tell({"data": [{"id": "other"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            if self.tokenize == "vllm" and "messages" in body:
                count = self.frame + len(body["messages"][0]["content"].split())
                return self.tell({"count": count})
            if self.tokenize == "llama.cpp":
                return self.tell({"tokens": body.get("content", "").split()})
            return self.tell({"error": "no such route"}, 404)
        said = body["messages"][0]["content"]
        usage = {"prompt_tokens": self.frame + len(said.split()), "completion_tokens": 1}
        message = {"role": "assistant", "content": "yes"}
        return self.tell(
            {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        )

    def tell(self, answer: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(**attributes: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Its", (Handler,), attributes))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("tokenize", "counting", "close"),
    [
        ("vllm", "the server's tokenizer, in its chat template", 0),
        ("llama.cpp", "the server's tokenizer, and its chat template's frame", 0),
        ("none", "estimated, ", 12),
    ],
)
def test_other_servers_count_as_well_as_they_can(tokenize: str, counting: str, close: int) -> None:
    text = "How many words are there in this text? " * 20
    with serving(tokenize=tokenize) as url:
        subject = ServerSubject(url)
        assert subject.parameters["model"] == "other"
        assert subject.counting.startswith(counting)
        assert abs(subject.count(text) - (7 + 160)) <= close
        assert subject.ask(text, 4).prompt_tokens == 167


def test_a_second_bos_of_the_server_is_told() -> None:
    class Doubling(Echo):
        def ask(self, text: str, max_tokens: int) -> Said:
            said = super().ask(text, max_tokens)
            return replace(said, prompt_tokens=self.count(text) + 1)

    (table,) = echoed(Doubling(), None).tables
    assert "the server counts +1 to +1 tokens in 12 of 12 prompts" in table.caption


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"127\.0\.0\.1:9/v1/models cannot be asked"):
        main(["bench", "ruler", "--base-url", "http://127.0.0.1:9"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AskedConfig(server_key="x"), "server_key is for a server"),
        (lambda: AskedConfig(base_url="localhost:1"), "must begin with http"),
        (lambda: RulerConfig(tasks="vt,other"), "tasks=other is unknown"),
        (lambda: RulerConfig(tasks="qa"), "qa and --squad-file need each other"),
        (lambda: RulerConfig(samples=0), "samples=0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_key_is_no_part_of_a_record() -> None:
    assert _without_key(["bench", "--server-key", "a", "--server-key=b"]) == [
        "bench",
        "--server-key",
        "...",
        "--server-key=...",
    ]


def test_codecs_are_compared_cold_warm_and_after_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--tasks niah_single_1,niah_multikey_3 --prompt-lengths 1024 --samples 2 --threads 1"
    variants = "--codecs int8 --caches restored,cold,warm"
    main(["bench", "ruler", "--out", str(tmp_path), *options.split(), *variants.split()])
    told = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["results"]
    ways = [(codec, cache) for codec in ("raw", "int8") for cache in ("cold", "warm", "restored")]
    totals = [
        ((row["kv_codec"], row["cache"]), row["n"], row["value"])
        for row in told
        if row["metric"] == "recall" and row["task"] == "all"
    ]
    assert totals == [(way, 4, 1.0) for way in ways]
    divergences = {
        (row["kv_codec"], row["cache"]): row["value"]
        for row in told
        if row["metric"] == "KL along answers, at least"
    }
    assert list(divergences) == ways[1:]  # all but raw cold, which they are compared with
    for codec in ("raw", "int8"):
        assert divergences[codec, "warm"] == divergences[codec, "restored"]
    assert divergences["raw", "warm"] < 1e-5 and divergences["int8", "warm"] < 1e-2
    found = {
        way: [
            each["cached_tokens"] for each in lines(tmp_path)[1:] if tuple(each["key"][:2]) == way
        ]
        for way in ways
    }
    for codec in ("raw", "int8"):
        assert found[codec, "cold"] == [0] * 4
        assert found[codec, "warm"] == found[codec, "restored"]
        assert min(found[codec, "warm"]) > 800


def test_a_server_has_its_own_codec_and_cache() -> None:
    with pytest.raises(SystemExit, match="--codecs or --caches is for a model in this process"):
        main(["bench", "ruler", "--base-url", "http://127.0.0.1:9", "--codecs", "int8"])


def test_the_command_prints_every_task_and_writes_a_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--tasks vt,fwe --prompt-lengths 4096 --samples 1 --threads 1 --no-answer-prefix"
    main(["bench", "ruler", "--model", str(model), "--out", str(tmp_path), *options.split()])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    rows = [row for row in record["results"] if row["metric"] == "recall"]
    assert [(row["task"], row["n"]) for row in rows] == [("vt", 1), ("fwe", 1), ("all", 2)]
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")
