"""longctx beside others: how their processes are spoken to, and that the figures are theirs."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from gguf import GGUFReader

from longctx.bench.options import read_configs
from longctx.bench.random_model import Size
from longctx.bench.served.process import write_options
from longctx.bench.versus import contender as contenders
from longctx.bench.versus.contender import Engine, running
from longctx.bench.versus.document_report import (
    conversation_results,
    conversation_table,
    draw_conversations,
)
from longctx.bench.versus.documents import converse, questions_on_text
from longctx.bench.versus.random_gguf import write_random_gguf
from longctx.bench.versus.servers import LlamaServer
from longctx.bench.versus.speed import Measured, measure_questions, measure_speeds
from longctx.bench.versus.speed_report import draw_speeds, speed_results, speed_tables
from longctx.bench.versus_config import VersusConfig
from longctx.cli import main
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.errors import InvalidRequest, LongctxError
from longctx.llm import LLM
from longctx.request import SamplingParams, Segment
from longctx.text.tokenizer import Tokenizer
from tests.support.words import Words

# Who has an environment with llama.cpp names its interpreter, as for the command
LLAMA_PYTHON = os.environ.get("LONGCTX_LLAMA_PYTHON") or (
    sys.executable if importlib.util.find_spec("llama_cpp") else None
)
SMALL = Size(hidden=64, layers=2, heads=4, kv_heads=2, mlp=96)
ADAPTER = '''
"""Says the prompt's last token, counted up; its clock is the length of the prompt."""

import os
from pathlib import Path


class Contender:
    def __init__(self, pace, keeps):
        print("what a library prints is no answer")
        self.pace, self.kept = pace, []
        self.about = {"engine": "fake 1.0", "kv": "f16", "dtype": "f32", "keeps": keeps,
                      "saves": keeps}

    def answer(self, prompt, new_tokens):
        if prompt[0] == 99:
            raise ValueError("a bad token")
        if prompt[0] == 98:
            os.write(2, b"out of memory")
            os._exit(3)
        known = os.path.commonprefix([self.kept, prompt])
        self.kept = prompt
        first = self.pace * (len(prompt) - len(known))
        return {"token_ids": [prompt[-1] + number for number in range(new_tokens)],
                "seconds": [first + self.pace * number for number in range(new_tokens)]}

    def save(self, folder):
        (Path(folder) / "kept").write_text(str(self.kept))
        return 1000

    def restore(self, folder):
        self.kept = eval((Path(folder) / "kept").read_text())
        return 0.5
'''


def engine(
    tmp_path: Path, name: str = "fake", *, pace: float = 1.0, keeps: bool = True, own: bool = False
) -> Engine:
    adapter = tmp_path / "with_fake.py"
    adapter.write_text(ADAPTER, encoding="utf-8")
    return Engine(
        name=name,
        adapter=adapter,
        python=Path(sys.executable),
        load={"pace": pace, "keeps": keeps},
        own=own,
    )


def test_an_engine_answers_from_its_own_process(tmp_path: Path) -> None:
    with running(engine(tmp_path)) as fake:
        assert fake.about["engine"] == "fake 1.0"
        answer = fake.answer((5, 6, 7), 3)
        assert answer.token_ids == (7, 8, 9)
        assert (answer.first_token_seconds, answer.interval_seconds) == (3.0, 1.0)
        peak = fake.peak_bytes()
        assert peak is None or 1 << 20 < peak < 1 << 30


def test_what_goes_wrong_in_an_engine_is_said_and_it_goes_on(tmp_path: Path) -> None:
    with running(engine(tmp_path)) as fake:
        with pytest.raises(LongctxError, match="fake could not answer: ValueError: a bad token"):
            fake.answer((99,), 2)
        assert fake.answer((1,), 2).token_ids == (1, 2)


def test_an_engine_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (
        running(engine(tmp_path)) as fake,
        pytest.raises(LongctxError, match=r"fake ended with 3 at answer: .*out of memory"),
    ):
        fake.answer((98,), 2)


def test_an_engine_that_cannot_be_loaded_and_an_absent_interpreter_are_told(tmp_path: Path) -> None:
    fake = engine(tmp_path)
    fake.adapter.write_text("import a_rival_that_is_absent", encoding="utf-8")
    with pytest.raises(LongctxError, match="could not load: ModuleNotFoundError"), running(fake):
        pass
    nowhere = contenders.rival(
        "x", "with_llama_cpp.py", tmp_path / "python", model=tmp_path, threads=1, context=1
    )
    with pytest.raises(InvalidRequest, match="name the interpreter"), running(nowhere):
        pass


def test_speeds_and_questions_are_compared(tmp_path: Path) -> None:
    own = engine(tmp_path, "longctx", own=True)
    slow = engine(tmp_path, "slow", pace=2.0, keeps=False)
    broken = Engine(name="broken", adapter=slow.adapter, python=slow.python, load={})
    found = {name: Measured() for name in ("longctx", "slow", "broken")}
    said: list[str] = []
    shared = {"rounds": 2, "vocab_size": 90, "seed": 0, "say": said.append}
    with running(own) as contender:
        measure_speeds(contender, [slow, broken], found, [70, 90], new_tokens=4, **shared)
    for each in (own, slow, broken):
        measure_questions(each, found[each.name], 90, **shared)
    assert found["broken"].failure is not None and "missing" in found["broken"].failure
    rows = [result.flat() for result in speed_results(found, {"model": "m", "threads": 1})]
    at = {(row["metric"], row["context_tokens"], row.get("baseline")): row for row in rows}
    assert at["prefill", 70, "slow"]["value"] == 70 and at["prefill", 70, "slow"]["ratio"] == 2
    assert at["decode", 90, "slow"]["value"] == 1000 and at["decode", 90, "slow"]["ratio"] == 2
    assert at["same tokens", 90, None]["value"] == 1.0
    assert at["first question", 90, "slow"]["baseline_value"] == 180
    assert at["another question", 90, None]["value"] == 32  # the question alone
    assert at["another after a restart", 90, None]["value"] == 32.5
    (table,) = speed_tables(found, {"model": "m", "threads": 1})
    assert table.row_count == 9 and "broken failed" in str(table.caption)
    draw_speeds(found, {"model": "m", "threads": 1}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


SERVER = '''#!{python}
"""Speaks as llama-server does; its answers are questions, or other ones without its cache."""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.say(json.dumps({{"data": [{{"id": "model"}}]}}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.startswith("/slots/0"):
            file = Path(given["--slot-save-path"]) / body["filename"]
            if self.path.endswith("save"):
                file.write_bytes(b"12345")
            return self.say(json.dumps({{"there": file.stat().st_size}}))
        asked = body["messages"][0]["content"]
        text = asked if body.get("cache_prompt", True) else asked.replace("odd", "other")
        deltas = [{{"role": "assistant"}}, {{"content": text[:3]}}, {{"content": text[3:]}}]
        events = [{{"choices": [{{"delta": delta}}]}} for delta in deltas]
        details = {{"cached_tokens": 3}}
        usage = {{"prompt_tokens": len(asked), "prompt_tokens_details": details}}
        lines = [json.dumps(event) for event in (*events, {{"choices": [], "usage": usage}})]
        self.say("".join(f"data: {{line}}\\n\\n" for line in (*lines, "[DONE]")))

    def say(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words):
        pass


HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
'''


def test_a_server_is_asked_before_and_after_a_restart(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(SERVER.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    server = LlamaServer(program, tmp_path / "model.gguf", threads=1, context=100)
    messages = ["even one", "odd two", "even three", "odd four"]
    said: list[str] = []
    talk = converse(server, messages, [0, 1, 2], tmp_path / "run", said_tokens=4, say=said.append)
    assert [asked.text for asked in (*talk.before, *talk.after)] == messages
    assert [asked.cached_tokens for asked in talk.after] == [3, 3]
    assert talk.same == 2 and len(talk.uncached) == 3  # "odd" is "other" without a cache
    assert talk.stored_bytes == 5 and talk.save_seconds > 0 and talk.restore_seconds > 0
    talks = {"longctx": talk, "llama.cpp": talk}
    common = {"model": "m", "threads": 1}
    rows = [result.flat() for result in conversation_results(talks, common)]
    shares = [row["value"] for row in rows if row["metric"] == "same answer as without a cache"]
    assert shares == [pytest.approx(2 / 3, abs=1e-3)] * 2
    assert conversation_table(talks, common).row_count == 7
    draw_conversations(talks, common, tmp_path / "document.png")
    assert (tmp_path / "document.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 4\n", encoding="utf-8")
    program.chmod(0o755)
    server = LlamaServer(program, tmp_path / "model.gguf", threads=1, context=100)
    with pytest.raises(LongctxError, match="server ended with 4: no such model"):
        converse(server, ["a", "b"], [], tmp_path / "run", said_tokens=4, say=lambda text: None)


def test_all_messages_have_one_text_and_each_its_question() -> None:
    messages = questions_on_text(900, 6, seed=0, tokenizer=Words(), sentences=None)
    texts, questions = zip(*(message.rsplit("\n\n", 1) for message in messages), strict=True)
    assert len(set(texts)) == 1 and len(set(questions)) == 6
    assert all(500 < len(message.split()) <= 900 for message in messages)


def test_options_reach_another_process_as_they_are(tmp_path: Path) -> None:
    config = EngineConfig(
        model=ModelConfig(model=tmp_path / 'a "quoted" Ünicode', threads=2),
        cache=CacheConfig(kv_codec="int8", force_codec=True, device_pool_gib=0.5),
    )
    path = write_options(config, tmp_path / "options.toml")
    assert read_configs("versus", (EngineConfig,), ["--config", str(path)]) == [config]


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0"])
def test_a_random_model_is_the_same_in_both_forms(weights: str, tmp_path: Path) -> None:
    gguf, plain = write_random_gguf(tmp_path, SMALL, weights, seed=1)
    assert {tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors} == {
        "F32",
        weights.upper(),
    }
    if weights == "q8_0":
        assert plain == gguf
        return
    prompt = (Segment(token_ids=tuple(range(300, 380))),)
    said = []
    for path in (gguf, plain):
        config = EngineConfig(
            model=ModelConfig(model=path, dtype="float32", threads=1),
            cache=CacheConfig(kv_codec="raw", device_pool_gib=0.1),
        )
        with LLM(config=config) as llm:
            sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            said.append(llm.answer(prompt, sampling).token_ids)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"compare": "speed,taste"}, "has taste; choose from"),
        ({"versus_lengths": "512,many"}, "must be whole numbers"),
        ({"versus_tokens": 1}, "must be at least 2"),
        ({"asked": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        VersusConfig(**options)  # type: ignore[arg-type]


def test_a_folder_is_not_given_to_engines_that_read_files(model: Path) -> None:
    with pytest.raises(SystemExit, match="--llama-python needs a GGUF file"):
        main(["bench", "versus", "--model", str(model), "--llama-python", sys.executable])


def test_a_file_is_not_given_to_an_engine_that_reads_folders(tmp_path: Path) -> None:
    gguf, _ = write_random_gguf(tmp_path, SMALL, "q8_0", seed=1)
    with pytest.raises(SystemExit, match="--vllm-python needs a folder"):
        main(["bench", "versus", "--model", str(gguf), "--vllm-python", sys.executable])


@pytest.mark.slow
def test_longctx_alone_is_measured_in_both_parts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--versus-lengths 20,300 --versus-tokens 4 --rounds 1 --threads 1 --kv-codec int8"
    options += " --force-codec --text-length 1500 --asked 2 --said-tokens 4 --dtype float32"
    main(["bench", "versus", "--model", str(model), "--out", str(tmp_path), *options.split()])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    at = {(row["metric"], row["context_tokens"]): row["value"] for row in record["results"]}
    assert at["prefill", 300] > 0 and at["decode", 20] > 0 and at["peak memory", 300] > 50
    same = [value for (metric, _), value in at.items() if metric.startswith("same answer")]
    assert same == [1.0]
    assert (tmp_path / "versus.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "versus-2.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    LLAMA_PYTHON is None, reason="no llama_cpp: name its interpreter by LONGCTX_LLAMA_PYTHON"
)
def test_llama_cpp_reads_the_random_model_and_takes_up_a_saved_prompt(
    tmp_path: Path,
) -> None:
    assert LLAMA_PYTHON is not None
    gguf, _ = write_random_gguf(tmp_path, SMALL, "f32", seed=1)
    llama = contenders.rival(
        "llama.cpp", "with_llama_cpp.py", Path(LLAMA_PYTHON), model=gguf, threads=1, context=512
    )
    prompt = tuple(range(300, 380))
    with running(llama) as contender:
        first = contender.answer(prompt, 8)
        assert contender.save(tmp_path) > 1000
    with running(llama) as contender:
        assert contender.restore(tmp_path) > 0
        assert contender.answer(prompt, 8).token_ids == first.token_ids
    config = EngineConfig(
        model=ModelConfig(model=gguf, dtype="float32", threads=1),
        cache=CacheConfig(kv_codec="raw", device_pool_gib=0.1),
    )
    with LLM(config=config) as llm:
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        ours = llm.answer((Segment(token_ids=prompt),), sampling).token_ids
    assert ours[0] == first.token_ids[0]  # later ones may part: its cache has 16 bits


def test_a_random_model_writes_any_text(tmp_path: Path) -> None:
    """The gate, which `auto` asks, has texts with every sign."""
    gguf, _ = write_random_gguf(tmp_path, SMALL, "q8_0", seed=1)
    tokenizer = Tokenizer(gguf)
    text = 'She said: "No!" 你好'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_ids.isdisjoint(ids)
