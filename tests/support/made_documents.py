"""Makes documents of every format that is read, as the programs of their users would."""

import io
import random
import tarfile
import zipfile

import docx
from PIL import Image
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas


def pdf(*pages: str, password: str | None = None, picture: int = 0, seed: int = 0) -> bytes:
    """Make a PDF; a page without text has a picture of a line.

    With `picture` each page has one of so many pixels a side besides, as scanned ones have, that
    does not compress: about four bytes each.
    """
    file = io.BytesIO()
    noise = random.Random(seed)
    encrypt = None if password is None else StandardEncryption(password, password)
    canvas = Canvas(file, encrypt=encrypt)
    for page in pages:
        for number, line in enumerate(page.split("\n")):
            canvas.drawString(72, 760 - 14 * number, line)
        canvas.line(72, 40, 300, 40)
        if picture:
            image = Image.frombytes("RGB", (picture, picture), noise.randbytes(3 * picture**2))
            canvas.drawImage(ImageReader(image), 300, 40, 72, 72)
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def word(*paragraphs: tuple[str, str]) -> bytes:
    """Make a Word document of (style, text)."""
    document = docx.Document()
    for style, text in paragraphs:
        document.add_paragraph(text, style=style)
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "left cell", "right cell"
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def epub(*chapters: str) -> bytes:
    names = [f"chapter{number}.xhtml" for number in range(len(chapters))]
    items = "".join(f'<item id="{name}" href="{name}"/>' for name in names)
    spine = "".join(f'<itemref idref="{name}"/>' for name in names)
    return zipped(
        ("mimetype", b"application/epub+zip"),
        (
            "META-INF/container.xml",
            b'<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:'
            b'container"><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>',
        ),
        (
            "OPS/book.opf",
            f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest>'
            f"<spine>{spine}</spine></package>".encode(),
        ),
        *((f"OPS/{name}", chapter.encode()) for name, chapter in zip(names, chapters, strict=True)),
    )


def zipped(*files: tuple[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            kind = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            archive.writestr(name, content, compress_type=kind)
    return made.getvalue()


def tarred(*files: tuple[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()
