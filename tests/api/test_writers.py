"""Text and calls in one answer, as responses and messages write them, however it is cut up."""

import json
from typing import Any

import pytest

from api.anthropic.writer import BlockWriter
from api.responses.writer import ItemWriter
from longctx.request import RequestOutput
from longctx.text.tool_forms import ToolForm, Writing

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Trieste"}}\n</tool_call>'
ANSWER = f"Let me see.\n{CALL}\n{CALL}"
CUT = ANSWER[: ANSWER.rindex("este")]
FORM = ToolForm(writing=Writing.TAGGED)


def outputs(text: str, size: int) -> list[RequestOutput]:
    pieces = [text[begin : begin + size] for begin in range(0, len(text), size)]
    return [RequestOutput(request_id="a", text=piece) for piece in pieces]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("complete", [True, False])
def test_events_of_a_response_tell_its_items(size: int, complete: bool) -> None:
    writer = ItemWriter(FORM, ["weather"], None)
    events: list[Any] = []
    for output in outputs(ANSWER if complete else CUT, size):
        events += writer.push(output)
    events += writer.finish(complete=complete)
    message, first, second = writer.items
    assert message["content"][0]["text"].strip() == "Let me see."
    assert json.loads(first["arguments"]) == {"city": "Trieste"}
    assert second["arguments"] == ('{"city": "Trieste"}' if complete else '{"city": "Tri')
    assert [item["status"] for item in writer.items] == [
        "completed",
        "completed",
        "completed" if complete else "incomplete",
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == writer.items
    for index, item in enumerate(writer.items):
        own = [event for event in events if event["output_index"] == index]
        assert own[0]["item"]["id"] == item["id"] and own[0]["item"]["status"] == "in_progress"
        told = "".join(event["delta"] for event in own if "delta" in event)
        assert told == (item["arguments"] if index else item["content"][0]["text"])


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("complete", [True, False])
def test_events_of_a_message_tell_its_blocks(size: int, complete: bool) -> None:
    writer = BlockWriter(FORM, ["weather"])
    events: list[Any] = []
    for output in outputs(ANSWER if complete else CUT, size):
        events += writer.push(output)
    events += writer.finish()
    said, first, second = writer.blocks
    assert said["text"].strip() == "Let me see."
    assert first["input"] == {"city": "Trieste"} and first["id"] != second["id"]
    cut = {"arguments": '{"city": "Tri'}
    assert second["input"] == (first["input"] if complete else cut)
    assert writer.calls == 2
    for index in range(3):
        own = [event for event in events if event["index"] == index]
        assert own[0]["type"] == "content_block_start" and own[-1]["type"] == "content_block_stop"
        told = "".join(
            event["delta"].get("text", "") + event["delta"].get("partial_json", "")
            for event in own[1:-1]
        )
        expected = said["text"] if index == 0 else json.dumps({"city": "Trieste"})
        assert told == expected or (index == 2 and not complete and told == '{"city": "Tri')


def test_an_answer_without_text_has_an_empty_message() -> None:
    writer = ItemWriter(None, (), None)
    list(writer.push(RequestOutput(request_id="a")))
    list(writer.finish(complete=True))
    assert [item["content"][0]["text"] for item in writer.items] == [""]
    blocks = BlockWriter(None, ())
    assert list(blocks.finish()) == [] and blocks.blocks == []
