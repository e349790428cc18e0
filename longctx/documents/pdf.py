"""PDF through PDFium, the reader of Chromium (pypdfium2: BSD and Apache)."""

import pypdfium2 as pdfium

from longctx.documents.read_text import ReadText, TextWriter, Unreadable


def read_pdf(data: bytes, limit_characters: int) -> ReadText:
    """Read all pages, each under a line `[page N]`, so that an answer can name its page.

    Raises Unreadable where it is encrypted, broken, or has pictures of text only.
    """
    writer = TextWriter(limit_characters=limit_characters)
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise Unreadable("the PDF is encrypted; upload it without a password") from error
        raise Unreadable(f"the PDF is broken: {error}") from error
    letters, pages = 0, len(document)
    try:
        for number in range(pages):
            text = _page_text(document, number)
            letters += len(text)
            label = f"page {number + 1}"
            writer.begin(label)
            writer.add(f"[{label}]\n{text}\n\n")
    finally:
        document.close()
    if letters == 0:
        raise Unreadable(
            f"the PDF has no text in its {pages} pages, only pictures: "
            "scan it with text recognition first"
        )
    return writer.finished("pdf")


def _page_text(document: pdfium.PdfDocument, number: int) -> str:
    try:
        page = document[number]
        text: str = page.get_textpage().get_text_bounded()
        page.close()
    except pdfium.PdfiumError as error:
        raise Unreadable(f"page {number + 1} of the PDF is broken: {error}") from error
    return text.replace("\r\n", "\n").replace("\0", "").strip()
