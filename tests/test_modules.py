"""Modules and prompts made of them: what they mean, whatever the model, level or neighbour."""

from collections.abc import Mapping, Sequence

import pytest

from longctx.request import Piece, Request, RequestClass, SamplingParams, Segment
from tests.assembled import DenseModel, Pieces, assembled
from tests.conftest import ModelFolders
from tests.recorded_engine import RecordedEngine, build_engine, some_ids

ARCHITECTURES = ("llama", "qwen3", "gemma2", "gemma3_text", "smollm3", "glm4", "olmo2", "cohere2")


def literal(length: int, seed: int, position: int | None = None, *, cut: bool = False) -> Segment:
    return Segment(token_ids=some_ids(length, seed), position=position, cut=cut)


def borrowed(
    module_id: str, piece: int = 0, *, link: int | None = 0, position: int | None = None
) -> Segment:
    return Segment(module_id=module_id, piece=piece, link_tokens=link, position=position)


def prompt(
    name: str, *segments: Segment, max_tokens: int = 4, n: int = 1, salt: str = ""
) -> Request:
    return Request(
        request_id=name,
        segments=segments,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, n=n),
        salt=salt,
    )


def encode(module_id: str, *, salt: str = "") -> Request:
    return Request(
        request_id=f"encode {module_id} {salt}",
        segments=(Segment(encodes=module_id),),
        sampling=SamplingParams(max_tokens=0),
        request_class=RequestClass.INGEST,
        salt=salt,
    )


def with_modules(engine: RecordedEngine, modules: Mapping[str, Pieces]) -> RecordedEngine:
    for module_id, pieces in modules.items():
        engine.open_module(module_id, pieces)
    return engine


def assert_means(
    engine: RecordedEngine,
    model: DenseModel,
    modules: Mapping[str, Pieces],
    *requests: Request,
    tolerance: float = 2e-4,
) -> None:
    """All logits that the engine drew from equal those of the dense twin."""
    for request in requests:
        answer = engine.answered[request.request_id].answer
        assert not engine.answered[request.request_id].errors
        twin = assembled(request.segments, modules, answer)
        rows = model.logits(twin.rows)[twin.own]
        drawn = engine.logits[request.request_id, 0]
        assert drawn, "nothing was drawn"
        for own_tokens, row in drawn.items():
            difference = float((row - rows[own_tokens - 1]).abs().max())
            assert difference < tolerance, (request.request_id, own_tokens, difference)


# -- positions and cuts -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_text_with_gaps_and_cuts_equals_a_dense_pass_at_these_positions(
    architecture: str, backend: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    model = DenseModel(folder)
    requests = [
        prompt(
            "gaps", literal(70, 1), literal(30, 2, 100), literal(5, 3, 131), literal(90, 4, 400)
        ),
        prompt("begins late", literal(9, 5, 300), literal(3, 6, 303 + 64)),
        prompt("cuts", literal(70, 1), literal(10, 2, cut=True), literal(64, 3, cut=True)),
        prompt("a window away", literal(100, 7), literal(1, 8, 120), literal(1, 9, 124)),
    ]
    for max_batch_tokens in (17, 96, 512):
        engine = build_engine(folder, backend=backend, max_batch_tokens=max_batch_tokens)
        engine.finish(*requests)
        assert_means(engine, model, {}, *requests)
        engine.assert_idle()


# -- modules ----------------------------------------------------------------------------------

MODULES: dict[str, Sequence[Piece]] = {
    "a": [Piece(token_ids=some_ids(100, 11), position=0)],
    "b": [
        Piece(token_ids=some_ids(65, 12), position=100),
        Piece(token_ids=some_ids(20, 13), position=180),
    ],
    "c": [Piece(token_ids=some_ids(3, 14), position=210)],
    "d": [Piece(token_ids=some_ids(128, 15), position=213)],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_assembled_prompts_equal_a_dense_pass(
    architecture: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    model = DenseModel(folder)
    requests = [
        prompt("one", borrowed("a"), literal(9, 1)),
        prompt("alone", borrowed("d")),
        prompt("argument", borrowed("b", 0), literal(7, 2, 165), borrowed("b", 1), literal(5, 3)),
        prompt(
            "all",
            *(borrowed(m, p) for m, p in (("a", 0), ("b", 0), ("b", 1), ("c", 0))),
            borrowed("d", 0),
            literal(70, 4),
        ),
        prompt(
            "linked",
            borrowed("a", link=16),
            borrowed("b", 0, link=16),
            literal(3, 5, 170),
            borrowed("b", 1),
            borrowed("d", link=64),
            literal(4, 6, 400),
        ),
        prompt("opening", literal(30, 7), borrowed("b", 0, link=100), borrowed("b", 1, link=3)),
        prompt("exact", borrowed("a", link=None), borrowed("c", link=None), literal(6, 8)),
        prompt("few", literal(1, 9), borrowed("c", 0), literal(1, 9)),
    ]
    for max_batch_tokens in (40, 512):
        engine = with_modules(build_engine(folder, max_batch_tokens=max_batch_tokens), MODULES)
        engine.finish(encode("a"), encode("b"))
        engine.finish(*requests)
        assert_means(engine, model, MODULES, *requests)
        engine.assert_idle()
