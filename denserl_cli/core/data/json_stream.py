"""JSON files, arrays element by element: a large one costs no more memory than its largest row."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, TextIO

from denserl_cli.core.errors import DenserlError

_BLOCK = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Make a DenserlError of what can be wrong with a file's JSON."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DenserlError(f"{path}: not UTF-8: {error}", hint="save it as UTF-8") from error
    except RecursionError as error:
        raise DenserlError(f"{path}: nested too deeply", hint="mend the file") from error
    except json.JSONDecodeError as error:
        raise DenserlError(
            f"{path}:{error.lineno}: broken JSON: {error.msg}",
            hint="mend the file, or write one row a line in a .jsonl file",
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise DenserlError(f"{path}: {error}", hint="mend the file") from error


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _is_array(path: Path, opened: Callable[[Path], BinaryIO]) -> bool:
    with opened(path) as file:
        return file.read(_BLOCK).removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def is_json_lines(path: Path, opened: Callable[[Path], BinaryIO] = _open) -> bool:
    """Whether a file goes on after a first line that is a row already."""
    if _is_array(path, opened):
        return False
    with opened(path) as file:
        first = next((line for line in file if line.strip()), b"")
        try:
            json.loads(first.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return False
        return any(line.strip() for line in file)


def json_elements(path: Path, opened: Callable[[Path], BinaryIO] = _open) -> Iterator[object]:
    """The elements of an array, read one by one; of an object's array, read at once."""
    with opened(path) as raw, TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        if _is_array(path, opened):
            yield from JsonArray(file)
            return
        document = json.loads(file.read())
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise DenserlError(f"{path}: neither a list of rows nor an object with such a list in data")
    yield from rows


class JsonArray:
    """The elements of the array that a text file holds.

    Iterating raises JSONDecodeError, with the file's line, where the array is broken.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at = "", 0
        self._lines = 0
        """Line breaks of the text that is read and done with."""
        self._block = _BLOCK

    def __iter__(self) -> Iterator[object]:
        self._take("[")
        if self._next() != "]":
            yield self._element()
        while self._next() != "]":
            self._take(",")
            yield self._element()
        self._take("]")
        if self._next():
            raise self._error("Extra data")

    def _element(self) -> object:
        """The next value, which the text at hand may hold but in part."""
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._read():
                    continue
                self._at = error.pos
                raise self._error(error.msg) from error
            if end < len(self._text) or not self._read():  # a number may go on
                self._at, self._block = end, _BLOCK
                return value

    def _take(self, mark: str) -> None:
        if self._next() != mark:
            raise self._error(f"Expecting '{mark}'")
        self._at += 1

    def _next(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def _read(self) -> bool:
        """Read on; False at the end of the file."""
        more = self._file.read(self._block)
        self._block *= 2  # a long element is not tried again and again
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _error(self, message: str) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, self._text, self._at)
        error.lineno += self._lines
        return error
