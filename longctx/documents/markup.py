"""HTML, and what is HTML inside: Word documents through mammoth (BSD), books as EPUB.

inscriptis (Apache) lays HTML out as text: tables keep their columns and lists their marks. It says
where headings lie, which become the sections.
"""

import posixpath
import zipfile
from io import BytesIO
from typing import Any

import mammoth
from inscriptis import get_annotated_text
from inscriptis.model.config import ParserConfig
from lxml import etree

from longctx.documents.encodings import decode
from longctx.documents.read_text import ReadText, TextWriter, Unreadable
from longctx.documents.zip_files import read_member

HEADINGS = ParserConfig(annotation_rules={f"h{level}": ["heading"] for level in range(1, 7)})
CONTAINER = "META-INF/container.xml"


def read_html(data: bytes, limit_characters: int) -> ReadText:
    """Read a page without its scripts and styles. Raises Unreadable where no text is in it."""
    text, encoding = decode(data)
    writer = TextWriter(limit_characters=limit_characters)
    _add_html(writer, text)
    if writer.characters == 0:
        raise Unreadable("the page has no text; one that scripts fill has to be saved as text")
    return writer.finished("html", encoding=encoding)


def read_docx(data: bytes, limit_characters: int) -> ReadText:
    """Read a Word document. Raises Unreadable where it is broken or has no text."""
    writer = TextWriter(limit_characters=limit_characters)
    try:
        # Pictures have no text, and would come as base64.
        html = mammoth.convert_to_html(
            BytesIO(data), convert_image=mammoth.images.img_element(lambda image: {"src": ""})
        ).value
    except Exception as error:  # whatever its reader meets in a file that somebody made
        raise Unreadable(f"the Word document is broken: {error}") from error
    _add_html(writer, html)
    if writer.characters == 0:
        raise Unreadable("the Word document has no text")
    return writer.finished("docx")


def read_epub(data: bytes, limit_characters: int) -> ReadText:
    """Read the chapters of a book in the order of its spine.

    Raises Unreadable where it is broken, has no text, or is encrypted.
    """
    writer = TextWriter(limit_characters=limit_characters)
    limit_bytes = 4 * limit_characters
    try:
        with zipfile.ZipFile(BytesIO(data)) as book:
            if "META-INF/encryption.xml" in book.namelist():
                raise Unreadable("the book is encrypted; longctx reads books without DRM")
            container = _xml(read_member(book, CONTAINER, limit_bytes=limit_bytes))
            (opf,) = container.xpath("//*[local-name()='rootfile'][1]/@full-path")
            package = _xml(read_member(book, opf, limit_bytes=limit_bytes))
            items = {
                item.get("id"): item.get("href")
                for item in package.xpath("//*[local-name()='manifest']/*[local-name()='item']")
            }
            for reference in package.xpath("//*[local-name()='spine']/*[local-name()='itemref']"):
                path = posixpath.join(posixpath.dirname(opf), items[reference.get("idref")])
                chapter, _ = decode(read_member(book, path, limit_bytes=limit_bytes))
                _add_html(writer, chapter)
    except (zipfile.BadZipFile, etree.XMLSyntaxError, KeyError, ValueError) as error:
        raise Unreadable(f"the book is broken: {error}") from error
    if writer.characters == 0:
        raise Unreadable("the book has no text")
    return writer.finished("epub")


def _add_html(writer: TextWriter, html: str) -> None:
    # lxml refuses text that names an encoding, since it is decoded already.
    if html.lstrip("\ufeff \t\r\n").startswith("<?xml"):
        html = html[html.index("?>") + 2 :] if "?>" in html else ""
    if not html.strip():
        return
    annotated = get_annotated_text(html, HEADINGS)
    text: str = annotated["text"]
    position = 0
    for begin, end, _ in sorted(annotated.get("label", ())):
        if begin < position or not text[begin:end].strip():
            continue  # a heading inside a heading
        writer.add(text[position:begin])
        writer.begin(" ".join(text[begin:end].split()))
        position = begin
    rest = text[position:].strip("\n")
    if rest:
        writer.add(rest + "\n\n")


def _xml(data: bytes) -> Any:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
    return etree.fromstring(data, parser)
