import hashlib
from pathlib import Path

import pytest

from api.files.upload import Upload
from api.http.errors import ApiError


def receive(tmp_path: Path, *chunks: bytes) -> tuple[Upload, bytes]:
    with Upload(tmp_path / "upload", limit_bytes=1 << 20) as upload:
        for chunk in chunks:
            upload.write(chunk)
        upload.finish()
        return upload, upload.path.read_bytes()


def test_text_arrives_as_it_was_sent_even_if_a_chunk_ends_inside_a_character(
    tmp_path: Path,
) -> None:
    data = "\ufeffGröße 你好 😀\r\n".encode()
    upload, written = receive(tmp_path, *(data[i : i + 1] for i in range(len(data))))
    assert written == data
    assert upload.size_bytes == len(data)
    assert upload.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([b"ab", b"c\0d"], "a zero at byte 3"),
        ([b"a" * 600, b"c\0d"], "a zero at byte 601"),
        ([b"\xd0\xcf", b"\x11\xe0..."], "an old Office document; save it as .docx or PDF"),
        ([b"\x89PNG..."], "an image"),
        ([b""], "the file is empty"),
        (["\ufeff \n\t".encode()], "the file is empty"),
    ],
)
def test_what_is_no_document_is_refused_by_name_and_position(
    tmp_path: Path, chunks: list[bytes], message: str
) -> None:
    with pytest.raises(ApiError) as caught:
        receive(tmp_path, *chunks)
    assert caught.value.status == 400
    assert message in caught.value.message
    assert "accepted are text, Markdown, CSV, HTML, PDF" in caught.value.message


def test_too_large_a_file_is_refused_with_the_option_to_raise(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=r"larger than 1 MiB.*--max-upload-mib") as caught:
        receive(tmp_path, b"a" * (1 << 20), b"a")
    assert caught.value.status == 413


def test_leaving_the_context_removes_the_file(tmp_path: Path) -> None:
    with Upload(tmp_path / "upload", limit_bytes=10) as upload:
        upload.write(b"text")
    assert not upload.path.exists()
