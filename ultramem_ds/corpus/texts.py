"""From the files of a package to documents of plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator

MIN_CHARS = 200
MIN_TEXT_SHARE = 0.6  # letters and blanks among all characters; tables of numbers have less
_ENTRY_BYTES = 6000  # of dictionary entries that make one document
_HTML = (".html", ".htm", ".xhtml", ".html.en")
_PLAIN = (
    *(".txt", ".rst", ".md", ".info", ".pod", ".texi"),
    *(".py", ".c", ".h", ".go", ".rs"),
)
_INFO_PART = re.compile(r"\.info(-\d+)?$")
# Lists of links and copies of sources, not prose.
_NAVIGATION = re.compile(
    r"(^|/)(genindex|search|py-modindex|index-[a-z]|allclasses|[a-z-]*members|_modules|_sources)"
)
_WORDS = re.compile(r"[^\W\d_]+|\s+")
_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def is_text(path: str) -> bool:
    """Whether a file of this name holds text that :func:`document` can read."""
    path = path.removesuffix(".gz")
    if path.endswith(_HTML):
        return not _NAVIGATION.search(path)
    return path.endswith(_PLAIN) or bool(_INFO_PART.search(path))


def document(path: str, data: bytes) -> str | None:
    """The text of one file without markup, or None where it holds no text worth reading."""
    text = _html_text(data) if path.endswith(_HTML) else _decoded(data)
    if text is None:
        return None
    text = text.replace("\r\n", "\n").replace("\x00", "").strip()
    if len(text) < MIN_CHARS or text_share(text) < MIN_TEXT_SHARE:
        return None
    return text + "\n"


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _html_text(data: bytes) -> str:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    html = bytes_to_str(data, detect_encoding(data) or "utf-8")
    text: str = extract_plain_text(html, main_content=True, alt_texts=False, noscript=False)
    return text


def text_share(text: str) -> float:
    """Share of letters and blanks among the characters of ``text``."""
    return sum(map(len, _WORDS.findall(text))) / len(text)


def fortunes(data: bytes) -> Iterator[str]:
    """A file of ``fortune``: sayings between lines of a percent sign, some dozens to a document."""
    text = _decoded(data)
    if text is None or "\n%\n" not in text:
        return
    yield from _joined(saying.strip() for saying in text.split("\n%\n"))


def dictionary(index: bytes, entries: bytes) -> Iterator[str]:
    """Entries of a dictd dictionary in the order of its text, some dozens to a document.

    Args:
        index: lines of headword, offset and length in base 64, separated by tabs.
        entries: the decompressed ``.dict`` file.
    """
    spans = set()
    for line in index.decode("utf-8", errors="replace").splitlines():
        word, offset, length, *_ = line.split("\t")
        if not word.startswith("00-database"):  # the dictionary's description of itself
            spans.add((_number(offset), _number(length)))
    decoded = (
        entries[offset : offset + length].decode("utf-8", errors="replace").strip()
        for offset, length in sorted(spans)
    )
    yield from _joined(decoded)


def _number(text: str) -> int:
    value = 0
    for letter in text:
        value = value * 64 + _BASE64.index(letter)
    return value


def _joined(parts: Iterator[str]) -> Iterator[str]:
    """Parts put together until a document has ``_ENTRY_BYTES``."""
    held: list[str] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= _ENTRY_BYTES:
            yield "\n\n".join(held) + "\n"
            held, size = [], 0
    if size >= MIN_CHARS:
        yield "\n\n".join(held) + "\n"
