"""Modules get their positions, and prompts are made of them."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_cache.assembly import SHORT_TOKENS, AssembledPrompt, ReusedPiece, assemble
from prompt_cache.errors import SchemaError
from prompt_cache.layout import PlacedModule, PlacedParameter, PlacedUnion, SchemaLayout, lay_out
from prompt_cache.pml import read_pml
from prompt_cache.schema import Schema
from prompt_cache.schema_json import schema_from
from tests.prompt_cache.schemas import TRAVEL, encode, schema_objects

FRAME = "<turn>"


def placed(schema: Schema, *, max_positions: int = 1 << 30) -> SchemaLayout:
    messages = len(schema.roles) + bool(schema.content)
    return lay_out(schema, encode, [encode(FRAME)] * messages, max_positions=max_positions)


def text(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode()


def prompt(layout: SchemaLayout, *modules: str, **arguments: str) -> AssembledPrompt:
    return assemble(layout, modules, arguments, encode)


@pytest.fixture
def travel() -> SchemaLayout:
    return placed(read_pml(TRAVEL))


def test_members_of_a_union_share_their_start_and_parameters_reserve_positions(
    travel: SchemaLayout,
) -> None:
    by_name = {module.name: module for module in travel.modules()}
    trip, harbour, mountains = (by_name[name] for name in ("trip", "harbour", "mountains"))
    assert harbour.position == mountains.position
    (duration,) = trip.parameters
    before, dot, back = trip.pieces
    assert (before.position, duration.position) == (trip.position, before.end)
    assert dot.position == duration.end == duration.position + 40
    assert harbour.position == dot.end
    assert back.position == max(harbour.end, mountains.end)
    assert by_name["hotel"].position == trip.end
    assert travel.end == by_name["prices"].end


def test_the_example_in_the_docstrings_is_true() -> None:
    schema = schema_from(
        {
            "name": "travel",
            "content": [
                "a" * 4,
                {
                    "module": "trip",
                    "content": [
                        "b" * 5,
                        {"parameter": "days", "length": 8},
                        "c",
                        {
                            "union": [
                                {"module": "harbour", "content": "h" * 100},
                                {"module": "mountains", "content": "m" * 60},
                            ]
                        },
                        "d" * 3,
                    ],
                },
            ],
        }
    )
    layout = lay_out(schema, encode, [encode("(f)")], max_positions=1000)
    always, trip, harbour, mountains = layout.modules()
    assert (always.position, always.end) == (0, 7)
    assert [(piece.position, piece.end) for piece in trip.pieces] == [(7, 12), (20, 21), (121, 124)]
    assert [(days.position, days.end) for days in trip.parameters] == [(12, 20)]
    assert [(part.position, part.end) for part in (harbour, mountains)] == [(21, 121), (21, 81)]
    assert (trip.tokens, layout.end) == (9, 124)
    made = prompt(layout, "mountains", days="ab")
    spans = [(part.position, part.position + len(part.token_ids)) for part in made.parts]
    assert spans == [(0, 7), (7, 12), (12, 14), (20, 21), (21, 81), (121, 124)]
    assert [type(part).__name__ for part in made.parts].index("ReusedPiece") == 4
    assert made.end == 124


def test_text_that_is_always_there_is_joined_with_the_template_to_modules(
    travel: SchemaLayout,
) -> None:
    (opening,) = [module for module in travel.modules() if module.anonymous]
    (piece,) = opening.pieces
    system = "You are a travel agent. Fish & chips <here>."
    assert text(piece.token_ids) == f"<turn>{system}<turn>Answer in one line.\n"
    assert (opening.name, piece.position) == ("#1", 0)


def test_a_prompt_has_the_chosen_modules_with_their_arguments_in_place(
    travel: SchemaLayout,
) -> None:
    made = prompt(travel, "mountains", duration="a week")  # brings "trip" along
    assert text(made.token_ids).partition("line.\n")[2] == (
        "Plan a trip of a week.\nThe mountain village.\nIt has a lift.\nCome back at night.\n"
    )
    reused = [(part.module, part.piece) for part in made.parts if isinstance(part, ReusedPiece)]
    assert reused == [("#1", 0), ("mountains", 0), ("trip", 2)]
    assert made.end == {module.name: module for module in travel.modules()}["trip"].end


def test_the_default_stands_where_no_argument_was_given(travel: SchemaLayout) -> None:
    assert "a trip of three days.\n" in text(prompt(travel, "trip").token_ids)


def test_a_scaffold_is_reused_whole_only_where_all_of_it_was_chosen(travel: SchemaLayout) -> None:
    alone = prompt(travel, "hotel")
    both = prompt(travel, "prices", "hotel", price="80")
    assert [p.module for p in alone.parts if isinstance(p, ReusedPiece)] == ["#1", "hotel"]
    assert [p.module for p in both.parts if isinstance(p, ReusedPiece)] == ["#1", "hotel+prices"]
    encoded = dict(travel.encoded())
    assert encoded["hotel+prices"] == (*encoded["hotel"], *encoded["prices"])


REFUSALS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "modules": (["mountain"], {}, 'no module "mountain"; did you mean "mountains"?'),
    "no module": (["x"], {}, 'has no module "x"; it has trip, harbour, mountains, hotel, prices'),
    "two": (
        ["harbour", "mountains"],
        {},
        '"mountains" and "harbour" are members of one union, which stand at the same positions; '
        "choose one of them",
    ),
    "long": (
        ["trip"],
        {"duration": "x" * 41},
        'the argument of "duration" has 41 tokens, its place in the schema is 40; shorten it',
    ),
    "missing": (["prices"], {}, 'parameter "price" has no default and no argument was given'),
    "unused": (
        ["hotel"],
        {"price": "3"},
        'parameter "price": it is in module "prices", which is not among the modules; choose it',
    ),
    "unknown": (
        ["hotel"],
        {"prise": "3"},
        'parameter "prise": the schema has no such parameter; it has duration, price',
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_choice_that_the_schema_does_not_offer_is_refused(
    travel: SchemaLayout, case: str
) -> None:
    modules, arguments, message = REFUSALS[case]
    with pytest.raises(SchemaError) as raised:
        assemble(travel, modules, arguments, encode)
    assert message in str(raised.value)
    assert raised.value.param == ("parameters" if arguments or case == "missing" else "modules")


def test_two_members_inside_of_modules_are_told_by_the_names_that_were_asked_for() -> None:
    member = '<module name="{0}">x<module name="in-{0}">y</module></module>'
    layout = placed(
        read_pml(
            f'<schema name="s"><union>{member.format("a")}{member.format("b")}</union></schema>'
        )
    )
    with pytest.raises(SchemaError, match=r'"in-b" \(inside "b"\) and "in-a" \(inside "a"\)'):
        prompt(layout, "in-a", "in-b")
    assert text(prompt(layout, "in-a").token_ids) == "<turn>x\ny\n"


def test_a_schema_longer_than_the_context_is_refused_with_its_longest_module() -> None:
    with pytest.raises(SchemaError, match=r"takes [0-9]+ positions, the limit is 100 .*\"trip\""):
        placed(read_pml(TRAVEL), max_positions=100)


def test_a_default_longer_than_its_slot_is_refused_with_its_line() -> None:
    markup = '<schema name="s">\n<parameter name="p" length="3" default="four"/></schema>'
    with pytest.raises(SchemaError, match='line 2, parameter "p": its default has 4 tokens'):
        placed(read_pml(markup))


def test_a_prompt_of_no_text_at_all_is_refused() -> None:
    schema = schema_from({"name": "s", "content": [{"module": "a", "content": "x"}]})
    layout = lay_out(schema, encode, [[]], max_positions=100)
    with pytest.raises(SchemaError, match="no text outside of its modules; choose one"):
        prompt(layout)


@settings(max_examples=40, deadline=None)
@given(schema_objects(), st.data())
def test_every_prompt_is_in_reading_order_and_within_the_schema(
    value: dict[str, Any], data: st.DataObject
) -> None:
    layout = placed(schema_from(value))
    names = [module.name for module in layout.modules() if not module.anonymous]
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    parameters = {slot.name for module in layout.modules() for slot in module.parameters}
    arguments = {name: data.draw(st.text("xyz", max_size=1)) for name in parameters}
    encoded = dict(layout.encoded())
    try:
        made = assemble(layout, chosen, arguments, encode)
    except SchemaError as error:
        assert error.param in ("modules", "parameters")
        return
    position = 0
    for part in made.parts:
        assert part.position >= position
        position = part.position + len(part.token_ids)
        if isinstance(part, ReusedPiece):
            piece = encoded[part.module][part.piece]
            assert (piece.token_ids, piece.position) == (part.token_ids, part.position)
            assert len(part.token_ids) >= SHORT_TOKENS
    assert made.end == position <= layout.end


@settings(max_examples=40, deadline=None)
@given(schema_objects())
def test_what_stands_side_by_side_never_overlaps(value: dict[str, Any]) -> None:
    layout = placed(schema_from(value))

    def check(parts: Sequence[Any], begin: int, end: int) -> None:
        position = begin
        for part in parts:
            assert part.position == position
            position = part.end
            match part:
                case PlacedModule():
                    check(part.parts, part.position, part.end)
                case PlacedUnion():
                    assert part.end == max(member.end for member in part.members)
                    for member in part.members:
                        check([member], part.position, member.end)
                case PlacedParameter():
                    assert part.default is None or len(part.default) <= part.length
        assert position == end

    check(layout.parts, 0, layout.end)
