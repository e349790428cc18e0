"""Conversations become tokens and documents, in an order that lets documents be reused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from longctx.errors import InvalidRequest
from longctx.request import Segment
from longctx.text.chat_template import ChatPrompts, FilePart, Message
from longctx.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import (
    DOCUMENTS_FIRST_TEMPLATE,
    INST_TEMPLATE,
    PLAIN_TEMPLATE,
    SPECIAL_TOKENS,
    write_tokenizer,
)

TRIMMING_TEMPLATE = PLAIN_TEMPLATE.replace("message['content']", "message['content'] | trim")
TITLED_TEMPLATE = DOCUMENTS_FIRST_TEMPLATE.replace(
    "document['text']", "document['title'] + ': ' + document['text']"
)
TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "documents first": DOCUMENTS_FIRST_TEMPLATE,
    "titled": TITLED_TEMPLATE,
    "inst": INST_TEMPLATE,
    "trimming": TRIMMING_TEMPLATE,
}


def chat(folder: Path, template: str | None) -> tuple[Tokenizer, ChatPrompts]:
    write_tokenizer(folder, chat_template=template)
    tokenizer = Tokenizer(folder)
    return tokenizer, ChatPrompts(tokenizer)


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, chat_template=TEMPLATES[request.param])
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> ChatPrompts:
    return ChatPrompts(tokenizer)


def decoded(tokenizer: Tokenizer, segments: tuple[Segment, ...]) -> list[str]:
    """Texts and document ids; control tokens are left out of the text."""
    return [segment.document_id or tokenizer.decode(segment.token_ids) for segment in segments]


ordinary = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40)
hostile = st.lists(st.sampled_from([*SPECIAL_TOKENS, "hello", " ", "\n", "<", "s>"])).map("".join)
a_file = FilePart("file-1", "A title")


@given(system=st.none() | ordinary, texts=st.lists(ordinary, min_size=1, max_size=5))
@settings(deadline=None)
def test_ordinary_messages_get_the_tokens_that_transformers_gives_them(
    prompts, hugging_face, system, texts
):
    roles = ["user", "assistant"] * len(texts)
    said = [*([("system", system)] if system is not None else []), *zip(roles, texts, strict=False)]
    expected = hugging_face.apply_chat_template(
        [{"role": role, "content": text} for role, text in said],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    (segment,) = prompts.render([Message(role, (text,)) for role, text in said])
    assert list(segment.token_ids) == expected


@given(system=st.none() | ordinary | hostile, text=ordinary | hostile, later=hostile)
@settings(deadline=None)
def test_a_conversation_about_a_file_begins_with_the_documents_prefix(prompts, system, text, later):
    opening = [] if system is None else [Message("system", (system,))]
    question = Message("user", (a_file, text))
    for messages in (
        [*opening, question],
        [*opening, question, Message("assistant", (later,)), Message("user", (later,))],
    ):
        first, document, *_rest = prompts.render(messages)
        assert first == Segment(token_ids=prompts.document_prefix(system, title=a_file.title))
        assert document == Segment(document_id="file-1")


@given(text=hostile, system=hostile)
@settings(deadline=None)
def test_messages_never_yield_control_tokens_of_their_own(prompts, tokenizer, text, system):
    def control_tokens(system: str, text: str) -> int:
        messages = [Message("system", (system,)), Message("user", (a_file, text))]
        segments = prompts.render(messages)
        return sum(tokenizer.is_special(i) for segment in segments for i in segment.token_ids)

    assert control_tokens(system, text) == control_tokens("calm", "calm")


def test_text_that_spells_a_control_token_is_still_read_in_full(prompts, tokenizer):
    segments = prompts.render([Message("user", (" what is </s>? ",))])
    assert "what is </s>?" in "".join(decoded(tokenizer, segments))


def test_files_come_before_the_text_of_their_message(tmp_path):
    tokenizer, prompts = chat(tmp_path, PLAIN_TEMPLATE)
    other = FilePart("file-2", "")
    segments = prompts.render([Message("user", ("first", a_file, "second", other))])
    assert decoded(tokenizer, segments) == ["", "file-1", "\n\n", "file-2", "\n\nfirst\nsecond"]


def test_a_message_may_be_a_file_alone(prompts):
    segments = prompts.render([Message("user", (a_file,))])
    assert segments[1] == Segment(document_id="file-1")


def test_a_template_that_takes_documents_places_each_once_in_order_of_appearance(tmp_path):
    tokenizer, prompts = chat(tmp_path, TITLED_TEMPLATE)
    other = FilePart("file-2", "</s> & more")
    messages = [
        Message("user", (a_file, "one?")),
        Message("assistant", ("yes",)),
        Message("user", (other, a_file, "two?")),
    ]
    assert decoded(tokenizer, prompts.render(messages)) == [
        "A title: ",
        "file-1",
        "\n\n</s> & more: ",
        "file-2",
        "\n\none?yestwo?",
    ]


def test_a_file_may_be_named_twice_where_content_is_in_place(tmp_path):
    tokenizer, prompts = chat(tmp_path, PLAIN_TEMPLATE)
    question = Message("user", (a_file, "x"))
    segments = prompts.render([question, Message("assistant", ("y",)), question])
    assert decoded(tokenizer, segments).count("file-1") == 2


def test_a_long_conversation_about_a_file_never_holds_the_file(prompts):
    segments = prompts.render([Message("user", (a_file, "short"))])
    assert sum(len(segment.token_ids) for segment in segments) < 100


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
            "leaves out the system message",
        ),
        ("{{ messages[-1]['content'] }}", "leaves out the system message"),
        (PLAIN_TEMPLATE + PLAIN_TEMPLATE, "repeats 2 times"),
        (PLAIN_TEMPLATE + "{{ messages[-1]['content'][:44] }}", "cuts a part"),
        ("{% if documents %}{% endif %}" + PLAIN_TEMPLATE, "leaves out file file-1"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['content'] + 1 }}", "refuses"),
        ("{{ unfinished", "refuses"),
    ],
)
def test_nothing_that_a_template_drops_is_dropped_in_silence(tmp_path, template, complaint):
    _, prompts = chat(tmp_path, template)
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        prompts.render([Message("system", ("be kind",)), Message("user", (a_file, "hello"))])
    assert caught.value.param == "messages"


def test_a_model_without_a_template_names_the_cure(tmp_path):
    _, prompts = chat(tmp_path, None)
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        prompts.render([Message("user", ("hello",))])


@pytest.mark.parametrize("messages", [[], [Message("user|></s>", ("x",))]])
def test_no_messages_and_roles_that_are_no_names_are_refused(prompts, messages):
    with pytest.raises(InvalidRequest):
        prompts.render(messages)


def test_the_documents_prefix_keeps_the_day_it_was_read_on(tmp_path):
    template = "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}. {{ messages[0]['content'] }}"
    tokenizer, prompts = chat(tmp_path, template)
    prefix = prompts.document_prefix(None, date="2024-02-29")
    assert tokenizer.decode(prefix) == "Today: 29 Feb 2024. "
    segments = prompts.render([Message("user", (a_file, "?"))], date="2024-02-29")
    assert segments[0].token_ids == prefix


def test_messages_of_one_role_are_joined_where_the_template_wants_turns(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=INST_TEMPLATE)
    prompts = ChatPrompts(Tokenizer(tmp_path))
    twice = [Message("user", ("One.",)), Message("user", ("Two.",))]
    assert prompts.render(twice) == prompts.render([Message("user", ("One.", "Two."))])
    with pytest.raises(InvalidRequest, match="must alternate"):
        prompts.render([Message("assistant", ("One.",))])


def test_what_a_template_keeps_is_looked_at_once_for_conversations_of_one_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second message of the user is lost, whatever it says; the first is not."""
    losing = "{{ messages[0]['content'] }}"
    tokenizer, prompts = chat(tmp_path, losing)
    rendered = 0
    render = Tokenizer.render

    def counted(self: Tokenizer, *arguments: object, **options: object) -> str:
        nonlocal rendered
        rendered += 1
        return render(self, *arguments, **options)

    monkeypatch.setattr(Tokenizer, "render", counted)
    for text in ("one", "two", "three"):
        (segment,) = prompts.render([Message("user", (text,))])
        assert tokenizer.decode(segment.token_ids) == text
    assert rendered == 2 + 1 + 1
    for _ in range(2):  # a shape that loses something is never taken for one that does not
        with pytest.raises(InvalidRequest, match="leaves out the assistant message"):
            prompts.render([Message("user", ("one",)), Message("assistant", ("two",))])
    rendered = 0
    prompts.render([Message("user", ("one", FilePart("f", "t")))])
    prompts.render([Message("user", ("one", FilePart("f", "t")))])
    assert rendered == 4  # titles and the like may matter
