"""Answers that have to follow a schema do so, whatever the model would rather say."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.embedded import model_path
from longctx.engine.grammars import Grammars
from longctx.errors import InvalidRequest
from longctx.request import FinishReason, Request
from longctx.text.grammar import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, json_grammar
from tests.support.recorded_engine import RecordedEngine, ask, build_engine, some_ids
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordedEngine]:
    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(folder)
    engine = build_engine(write_model(folder, num_hidden_layers=1))
    yield engine
    engine.assert_idle()
    engine.close()


NUMBERS = iter(range(10**6))


def constrained(
    schema: dict[str, Any], *, strict: bool = True, max_tokens: int = 200, **options: Any
) -> Request:
    name = f"{next(NUMBERS)}"
    request = ask(
        name, some_ids(20, 1), max_tokens=max_tokens, ignore_eos=False, temperature=1.0, **options
    )
    grammar = json_grammar(schema, strict=strict, param="schema")
    return replace(request, sampling=replace(request.sampling, grammar=grammar))


# Schemas that end: what a random model says within them has a bounded length.
leaves = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.one_of(st.text(max_size=5), st.integers(-99, 99), st.booleans(), st.none()),
            min_size=1,
            max_size=4,
            unique_by=json.dumps,
        ),
    ),
    st.builds(lambda text: {"const": text}, st.text(max_size=6)),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(["^[a-c]{2}$", "^x?y$"])),
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
    objects = st.builds(
        lambda properties, keep: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:keep],
            "additionalProperties": False,
        },
        st.dictionaries(names, inner, max_size=3),
        st.integers(0, 3),
    )
    arrays = st.builds(
        lambda items, low, more: {
            "type": "array",
            "items": items,
            "minItems": low,
            "maxItems": low + more,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    either = st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
    return st.one_of(objects, arrays, either)


schemas = st.recursive(leaves, nested, max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6), max_tokens=st.sampled_from([1, 7, 600]))
def test_an_answer_is_valid_for_its_schema_or_was_cut_short(
    engine: RecordedEngine, schema: dict[str, Any], seed: int, max_tokens: int
) -> None:
    (answer,) = engine.finish(constrained(schema, seed=seed, max_tokens=max_tokens))
    assert not answer.errors
    if answer.reason is FinishReason.LENGTH:
        assert len(answer.answer) == max_tokens
        return
    assert answer.reason is FinishReason.STOP
    jsonschema.validate(json.loads(answer.texts[0]), schema)


@pytest.fixture(scope="module")
def embedded() -> Iterator[RecordedEngine]:
    engine = build_engine(model_path("needle"))
    yield engine
    engine.close()


@settings(max_examples=25, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 0.7, 1.5]))
def test_the_embedded_model_keeps_to_any_schema(
    embedded: RecordedEngine, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    request = constrained(schema, seed=seed, max_tokens=300)
    sampling = replace(request.sampling, temperature=temperature)
    (answer,) = embedded.finish(replace(request, sampling=sampling))
    assert not answer.errors
    if answer.reason is not FinishReason.LENGTH:
        jsonschema.validate(json.loads(answer.texts[0]), schema)


def test_a_long_enough_answer_ends_by_itself(engine: RecordedEngine) -> None:
    for seed in range(5):
        (answer,) = engine.finish(constrained(PERSON, seed=seed))
        assert answer.reason is FinishReason.STOP
        jsonschema.validate(json.loads(answer.texts[0]), PERSON)


def test_choices_follow_the_grammar_each_for_itself(engine: RecordedEngine) -> None:
    (answer,) = engine.finish(constrained(PERSON, seed=3, n=3))
    assert len(set(answer.texts.values())) == 3
    for text in answer.texts.values():
        jsonschema.validate(json.loads(text), PERSON)


def test_greedy_biased_and_penalized_answers_follow_it_too(engine: RecordedEngine) -> None:
    request = constrained(PERSON)
    for changes in (
        {"temperature": 0.0},
        {"logit_bias": dict.fromkeys(range(5, 200), 50.0)},
        {"top_k": 2, "top_p": 0.5, "repetition_penalty": 1.5, "seed": 1},
        {"ignore_eos": True},
    ):
        sampling = replace(request.sampling, **changes)
        (answer,) = engine.finish(replace(request, request_id=f"{changes}", sampling=sampling))
        if answer.reason is FinishReason.STOP:
            jsonschema.validate(json.loads(answer.texts[0]), PERSON)
        assert not answer.errors


def test_a_preempted_answer_goes_on_within_its_grammar(engine: RecordedEngine) -> None:
    request = constrained(PERSON, seed=7)
    (whole,) = engine.finish(request)
    again = replace(request, request_id="preempted")
    engine.submit(again)
    before = engine.preemptions
    while engine.has_work:
        engine.take_step()
        running = engine.scheduler.running
        if engine.preemptions < before + 3 and running and running[0].completion_tokens > 4:
            engine.scheduler.preempt(running[0])
    assert engine.preemptions == before + 3
    assert engine.answered["preempted"].texts == whole.texts


def test_others_are_answered_while_a_grammar_compiles(engine: RecordedEngine) -> None:
    compiled = threading.Event()
    compile_ = Grammars._matcher

    def slow(self: Grammars, grammar: str) -> Any:
        assert compiled.wait(60)
        return compile_(self, grammar)

    with mock.patch.object(Grammars, "_matcher", slow):
        held = constrained({"const": "only here"})
        engine.submit(held)
        other = ask("other", some_ids(30, 2), max_tokens=5)
        engine.submit(other)
        while not engine.answered["other"].finished:
            engine.take_step()
        assert not engine.answered[held.request_id].finished
        compiled.set()
        while engine.has_work:
            engine.take_step()
    assert engine.answered[held.request_id].texts[0] == '"only here"'


def test_a_request_may_end_before_its_grammar_is_compiled(engine: RecordedEngine) -> None:
    request = constrained({"const": "nobody waits"})
    engine.submit(request)
    engine.abort(request.request_id)
    while engine.has_work:
        engine.take_step()
    assert engine.answered[request.request_id].reason is FinishReason.ABORT


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "nonsense"}, "Invalid type"),
        ({"type": "string", "pattern": "["}, "regex"),
        ({"not": {"type": "string"}}, "Unimplemented"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "https://example.org/schema.json"}, "example.org"),
        ({"$ref": "#"}, ""),
        ({"anyOf": [{"$ref": "#/anyOf/0"}]}, ""),
    ],
)
def test_what_cannot_be_followed_is_refused_and_harms_nobody(
    engine: RecordedEngine, schema: dict[str, Any], says: str
) -> None:
    request = constrained(schema, max_tokens=30)
    other = ask(f"beside {request.request_id}", some_ids(9, 3), max_tokens=2)
    outputs = []
    engine.submit(request)
    engine.submit(other)
    while engine.has_work:
        outputs += engine.take_step()
    (last,) = (o for o in outputs if o.request_id == request.request_id and o.finished)
    assert last.finish_reason is FinishReason.ERROR and last.error is not None
    assert last.error_param == "response_format" and says in last.error
    assert not engine.answered[other.request_id].errors


def test_an_answer_without_an_end_is_cut_short(engine: RecordedEngine) -> None:
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    (answer,) = engine.finish(constrained(endless, max_tokens=30))
    assert (answer.reason, len(answer.answer)) == (FinishReason.LENGTH, 30)


def test_without_strict_unknown_keywords_are_passed_over(engine: RecordedEngine) -> None:
    schema = {"type": "integer", "maximum": 9, "minimum": 0, "not": {"const": 3}}
    (answer,) = engine.finish(constrained(schema, strict=False))
    assert 0 <= json.loads(answer.texts[0]) <= 9


def test_schemas_have_limits() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(MAX_SCHEMA_DEPTH):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match=rf"101 levels deep, the limit is {MAX_SCHEMA_DEPTH}"):
        json_grammar(deep, strict=True, param="schema")
    large = {"enum": ["x" * 1000] * 300}
    with pytest.raises(InvalidRequest, match=f"the limit is {MAX_SCHEMA_BYTES}") as caught:
        json_grammar(large, strict=True, param="schema")
    assert caught.value.param == "schema"


def test_the_largest_schemas_compile_or_are_refused(engine: RecordedEngine) -> None:
    width = {f"p{i}": {"enum": [f"{i} {j}" for j in range(40)]} for i in range(500)}
    schema = {"type": "object", "properties": width, "additionalProperties": False}
    assert 200_000 < len(json.dumps(schema)) <= MAX_SCHEMA_BYTES
    (answer,) = engine.finish(constrained(schema, max_tokens=20))
    assert answer.reason in (FinishReason.STOP, FinishReason.LENGTH)
