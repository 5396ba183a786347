from __future__ import annotations

import io
import json

import pytest

from denserl_cli.core.data import json_stream as json_files
from denserl_cli.core.data.json_stream import JsonArray

ELEMENTS = [{"a": [1, {"b": "],[\n é\ud800"}]}, 12345, -1.5e-3, "x" * 40, None, [], {}, True]


@pytest.mark.parametrize("block", [1, 2, 7, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_elements_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", block)
    for elements in (ELEMENTS, ELEMENTS[:1], ELEMENTS[1:2], []):
        text = f" \n{json.dumps(elements, indent=indent)}\n "
        assert list(JsonArray(io.StringIO(text))) == elements


@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize(
    ("text", "line"),
    [('[1,\n{"a" 2}]', 2), ("[1\n2]", 2), ("[1,\n\n", 3), ("[1]\n]", 2), ("[1,]", 1), ("[", 1)],
)
def test_a_broken_array_names_its_line(
    monkeypatch: pytest.MonkeyPatch, block: int, text: str, line: int
) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", block)
    with pytest.raises(json.JSONDecodeError) as caught:
        list(JsonArray(io.StringIO(text, newline="")))
    assert caught.value.lineno == line
