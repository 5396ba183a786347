"""Chat templates that packages ship: each is written exactly, or refused with what to do.

They are read from the installed packages, or from wheels in the folder that the environment
variable DENSERL_TEMPLATE_WHEELS names; without either there is nothing to test.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.errors import DenserlError
from tests.core.chat.test_answers import LLAMA_2, check_ids
from tests.core.fake_tokenizers import blank_tokenizer, load

FOLDERS = {"trl": "chat_templates", "axolotl": "utils/chat_templates/templates"}
TOKENIZERS = ("phi3-mini", "blanks")
_MARKER = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|\[\|[a-z]+\|\]|\[/?INST\]|<[a-z]+_of_turn>|<turn\|>"
)


def shipped() -> Iterator[tuple[str, str]]:
    """Names and texts of the templates."""
    for package, inner in FOLDERS.items():
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder, inner).glob("*.jinja")):
                yield f"{package}/{file.stem}", file.read_text(encoding="utf-8")
    wheels = Path(os.environ.get("DENSERL_TEMPLATE_WHEELS", os.devnull))
    for wheel in sorted(wheels.glob("*.whl")):
        with ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".jinja") and "chat_templates" in name:
                    package, file = name.split("/")[0], Path(name)
                    yield f"{package}/{file.stem}", archive.read(name).decode()


TEMPLATES = dict(shipped())


def tokenizer_for(shared: Path, name: str, source: str) -> PreTrainedTokenizerBase:
    """A tokenizer that knows the markers of a template as special tokens."""
    known = blank_tokenizer(LLAMA_2) if name == "blanks" else load(shared / "tokenizers" / name)
    made = copy.deepcopy(known)
    markers = sorted(set(_MARKER.findall(source)))
    made.add_special_tokens({"additional_special_tokens": markers})
    made.add_tokens([marker for marker in ("<think>", "</think>") if marker in source])
    made.chat_template = source
    if made.bos_token is None:
        made.bos_token = made.eos_token
    return made


@pytest.fixture
def on_the_fixed_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day that prompts have, for templates that ask for today's."""

    class Then(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Then:  # type: ignore[override]
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


@pytest.mark.skipif(not TEMPLATES, reason="neither trl nor axolotl nor DENSERL_TEMPLATE_WHEELS")
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.usefixtures("on_the_fixed_day")
def test_ids_are_those_of_the_template_or_there_is_a_reason(
    shared: Path, name: str, template: str
) -> None:
    tokenizer = tokenizer_for(shared, name, TEMPLATES[template])
    try:
        ChatFormat.of(tokenizer)
    except DenserlError as error:
        assert error.hint
        argument = re.search(r"chat\.template_arguments: \{(\w+): (true|false)\}", error.hint)
        if argument:
            assert check_ids(tokenizer, **{argument[1]: argument[2] == "true"})
        return
    assert check_ids(tokenizer)
