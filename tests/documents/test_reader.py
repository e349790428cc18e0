"""Every format gives its text and its borders; what has none says why."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.documents import archive, reader
from longctx.documents.read_text import ReadText, Unreadable
from longctx.documents.reader import format_of, is_plain_text, read_bytes
from tests.support.made_documents import epub, pdf, tarred, word, zipped

PAGE = "<html><head><title>T</title><script>var secret;</script><style>p {}</style></head><body>"


def labelled(read: ReadText) -> dict[str, str]:
    """The first line of each section, by its label."""
    return {each.label: read.text[each.offset :].lstrip().split("\n")[0] for each in read.sections}


def test_a_pdf_has_its_pages_in_order_each_under_its_number() -> None:
    read = read_bytes(
        pdf(*(f"This is sheet {n}.\nIt says {n * n}." for n in range(1, 31))), "a.pdf"
    )
    assert read.format == "pdf" and len(read.sections) == 30
    for number, section in enumerate(read.sections, 1):
        text = read.text[section.offset :]
        assert section.label == f"page {number}"
        assert text.startswith(f"[page {number}]\nThis is sheet {number}.\nIt says {number**2}.")


def test_html_has_its_text_and_headings_and_no_scripts() -> None:
    html = PAGE + "<h1>First</h1><p>one &amp; two</p><h2>Second <b>part</b></h2><p>three</p></body>"
    read = read_bytes(html.encode(), "page.html")
    assert read.format == "html" and read.encoding == "utf-8"
    assert "one & two" in read.text and "three" in read.text
    assert "secret" not in read.text and "<" not in read.text
    assert labelled(read) == {"First": "First", "Second part": "Second part"}


def test_a_word_document_has_its_paragraphs_headings_and_tables() -> None:
    made = word(("Heading 1", "Of ships"), ("Normal", "They float."), ("Heading 2", "Of sails"))
    read = read_bytes(made, "ships.docx")
    assert read.format == "docx" and "They float." in read.text
    assert "left cell" in read.text and "right cell" in read.text
    assert list(labelled(read)) == ["Of ships", "Of sails"]


def test_a_book_has_its_chapters_in_the_order_of_its_spine() -> None:
    read = read_bytes(epub(PAGE + "<h1>One</h1>it begins", PAGE + "<h1>Two</h1>it ends"), "b.epub")
    assert read.format == "epub" and list(labelled(read)) == ["One", "Two"]
    assert read.text.index("it begins") < read.text.index("it ends")


@pytest.mark.parametrize(("make", "format"), [(zipped, "zip"), (tarred, "tar")])
def test_a_tree_has_each_file_under_its_path_and_names_what_it_left_out(
    make: Callable[..., bytes], format: str
) -> None:
    tree = make(
        ("src/main.py", b"print('hello')\n"),
        ("README.md", "Größe".encode("latin-1")),
        ("docs/paper.pdf", pdf("Paper text.")),
        ("logo.png", b"\x89PNG\r\n\x1a\n"),
        ("inner.zip", zipped(("a.txt", b"inner"))),
    )
    read = read_bytes(tree, "project")
    assert read.format == format
    assert list(labelled(read)) == ["README.md", "docs/paper.pdf", "src/main.py"]
    assert "# src/main.py\n\nprint('hello')" in read.text
    assert "Größe" in read.text and "Paper text." in read.text and "inner" not in read.text
    assert [each.split(":")[0] for each in read.skipped] == ["inner.zip", "logo.png"]


PROSE = "Der Bär überquert die Straße; müde, aber fröhlich geht er über die große Brücke. " * 20


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"]
)
def test_text_is_read_in_the_encoding_that_it_is_in(encoding: str) -> None:
    read = read_bytes(PROSE.encode(encoding), "baer.txt")
    assert read.text == PROSE and read.format == "text" and read.encoding


def test_russian_in_its_old_encoding_is_read() -> None:
    text = "Медведь переходит дорогу и медленно идёт по большому мосту через реку. " * 20
    assert read_bytes(text.encode("cp1251"), "a.txt").text == text


def test_a_damaged_utf8_file_is_not_taken_for_another_encoding() -> None:
    data = PROSE.encode()
    with pytest.raises(Unreadable, match=r"damaged UTF-8.* at byte 500"):
        read_bytes(data[:500] + b"\xff" + data[500:], "a.txt")


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "a.txt", "is empty"),
        (b" \n\t", "a.txt", "is empty"),
        (b"\0\1\2garbage", "a.txt", "binary: a zero at byte 0"),
        (b"%PDF-1.7 and nothing more", "a.pdf", "the PDF is broken"),
        (b"PK\x03\x04 and nothing more", "a.zip", "the ZIP archive is broken"),
        (b"PK\x03\x04 and nothing more", "a.docx", "the Word document is broken"),
        (b"PK\x03\x04 and nothing more", "a.epub", "the book is broken"),
        (b"PK\x03\x04", "a.xlsx", "save it as PDF"),
        (b"\x1f\x8b and nothing more", "a.tar.gz", "the tar archive is broken"),
        (PAGE.encode() + b"<script>fill()</script>", "a.html", "the page has no text"),
    ],
)
def test_what_has_no_text_says_why(data: bytes, name: str, message: str) -> None:
    with pytest.raises(Unreadable, match=message):
        read_bytes(data, name)


def test_an_encrypted_pdf_and_one_of_pictures_say_so() -> None:
    with pytest.raises(Unreadable, match="encrypted; upload it without a password"):
        read_bytes(pdf("secret", password="x"), "a.pdf")
    with pytest.raises(Unreadable, match="no text in its 2 pages, only pictures"):
        read_bytes(pdf("", ""), "a.pdf")


def test_an_encrypted_member_and_a_book_with_rights_management_say_so() -> None:
    made = zipped(("mimetype", b"application/epub+zip"), ("META-INF/encryption.xml", b"<x/>"))
    with pytest.raises(Unreadable, match="DRM"):
        read_bytes(made, "a.epub")


def test_what_expands_beyond_the_limit_is_refused_before_it_is_read_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "MAX_CHARACTERS", 1 << 20)
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 1 << 20)
    bomb = zipped(("zeros.txt", b"a" * (64 << 20)))
    assert len(bomb) < 100_000
    with pytest.raises(Unreadable, match="no file with text"):
        read_bytes(bomb, "bomb.zip")
    many = zipped(*((f"{number}.txt", b"a" * 900_000) for number in range(4)))
    with pytest.raises(Unreadable, match="expands to more than 1,048,576 characters"):
        read_bytes(many, "many.zip")


def test_an_archive_cannot_name_a_file_outside() -> None:
    read = read_bytes(zipped(("../../etc/passwd", b"text\n")), "evil.zip")
    assert read.sections[0].label == "../../etc/passwd"  # a heading; nothing is unpacked


def test_an_entity_bomb_and_an_outside_entity_are_not_resolved(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("very secret")
    evil = (
        f'<?xml version="1.0"?><!DOCTYPE p [<!ENTITY x SYSTEM "file://{secret}">]>'
        "<html><body><p>&x; text</p></body></html>"
    )
    read = read_bytes(epub(evil), "evil.epub")
    assert "very secret" not in read.text and "text" in read.text


@pytest.mark.parametrize("make", [lambda: pdf("One page."), lambda: word(("Normal", "text")),
                                  lambda: epub("<p>text</p>"), lambda: zipped(("a", b"text")),
                                  lambda: tarred(("a", b"text"))])  # fmt: skip
def test_damaged_documents_are_read_or_refused_and_nothing_else(make: Callable[[], bytes]) -> None:
    good, choose = make(), random.Random(3)
    for _ in range(60):
        data = bytearray(good)
        for _ in range(choose.randint(1, 20)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        data = data[: choose.choice([len(data), choose.randrange(1, len(data))])]
        try:
            read_bytes(bytes(data), "damaged")
        except Unreadable as error:
            assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from(["a.txt", "a.html", "a.docx", "a.md", ""]))
def test_any_bytes_are_text_or_refused(data: bytes, name: str) -> None:
    try:
        read = read_bytes(data, name)
    except Unreadable:
        return
    assert read.text and read.format in ("text", "html", "docx", "pdf", "epub", "zip", "tar")


def test_plain_text_is_known_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data, plain in [
        (b"text", True),
        ("\ufeffGröße".encode(), True),
        ("Größe".encode("latin-1"), False),
        ("Größe".encode("utf-16"), False),
        (b"a" * 5000 + "ö".encode()[:1], False),
        (b"%PDF-", False),
    ]:
        path.write_bytes(data)
        assert is_plain_text(path, "a.txt") is plain
    assert format_of(b"<!DOCTYPE html>", "x") == "html"
