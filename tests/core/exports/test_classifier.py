"""A bandit reward model as a classifier: what any program reads at the last token is the score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    pipeline,
)

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.exports.classifier import (
    check_possible,
    classifier_template,
    padding_id,
    write_classifier,
)
from denserl_cli.core.exports.compatibility import write_config, write_tokenizer_config
from denserl_cli.core.models.reward_metadata import RewardRecord
from tests import SHARED, tiny
from tests.core.exports.conftest import Reader

CONVERSATIONS = [
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue, like the sky.\n\nOr red."},
    ],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one?"},
        {"role": "assistant", "content": "Green — ünïcode, 12.5 and\tmore"},
    ],
]
READ = """
import json, sys
from transformers import pipeline
classifier = pipeline("text-classification", model=sys.argv[1], device="cpu")
classifier.tokenizer.padding_side = sys.argv[2]
render = classifier.tokenizer.apply_chat_template
texts = [render(messages, tokenize=False) for messages in json.loads(sys.argv[3])]
print(json.dumps([found["score"] for found in classifier(texts, batch_size=len(texts))]))
"""


def real(name: str) -> Path:
    """A folder of a real tokenizer."""
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"no real tokenizer {name} among the shared fixtures")
    return folder


def write_model(tokenizer_folder: Path, folder: Path) -> ChatFormat:
    """Write a reward model with random weights and a tokenizer; returns how it reads."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat = ChatFormat.of(tokenizer)
    torch.manual_seed(0)
    config = tiny.config(vocabulary=len(tokenizer))
    config.num_labels, config.pad_token_id = 1, chat.pad_id
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_config(folder, problem_type="regression")
    write_tokenizer_config(folder)
    return chat


def scores(folder: Path, chat: ChatFormat) -> list[float]:
    """The head's value at the terminator, of the ids that training reads."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    found = []
    for messages in CONVERSATIONS:
        ids = chat.encode_prompt(messages) + chat.encode_response(messages[-1]["content"])
        with torch.no_grad():
            states = model.base_model(torch.tensor([ids])).last_hidden_state
        found.append(model.score(states)[0, -1, 0].item())
    return found


@pytest.mark.parametrize("name", ["phi3-mini", "llama3", "llama3.1"])
def test_the_pipeline_reads_the_score(name: str, tmp_path: Path):
    chat = write_model(real(name), tmp_path / "rm")
    expected = scores(tmp_path / "rm", chat)
    write_classifier(tmp_path / "rm", chat)
    classifier = pipeline("text-classification", model=str(tmp_path / "rm"), device="cpu")
    tokenizer = classifier.tokenizer
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in CONVERSATIONS]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        found = [one["score"] for one in classifier(texts, batch_size=2)]
        assert found == pytest.approx(expected, abs=1e-5)
        ids = [
            chat.encode_prompt(m) + chat.encode_response(m[-1]["content"]) for m in CONVERSATIONS
        ]
        assert classifier.tokenizer(texts)["input_ids"] == ids


def test_release_4_reads_the_score_too(tmp_path: Path, transformers_4: Reader):
    chat = write_model(real("llama3"), tmp_path / "rm")
    expected = scores(tmp_path / "rm", chat)
    write_classifier(tmp_path / "rm", chat)
    found = transformers_4(READ, tmp_path / "rm", "left", json.dumps(CONVERSATIONS))
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_terminator_is_never_taken_for_padding():
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(real("llama3")))
    assert chat.pad_id == chat.terminator_id  # what a classifier would skip at the end
    rows = len(chat.template.tokenizer)
    assert padding_id(chat, rows) not in (chat.terminator_id, *chat.encode_prompt(CONVERSATIONS[0]))
    phi = ChatFormat.of(AutoTokenizer.from_pretrained(real("phi3-mini")))
    assert padding_id(phi, 32064) == phi.template.tokenizer.pad_token_id  # its own is fine
    with pytest.raises(DenserlError, match="no special token to pad with"):
        padding_id(chat, rows=128000)  # all special tokens lie beyond the embeddings


def test_other_conversations_are_rendered_as_before():
    tokenizer = AutoTokenizer.from_pretrained(real("llama3.1"))
    chat = ChatFormat.of(tokenizer)
    before, template = chat.template, classifier_template(chat)
    for messages, generation in ((CONVERSATIONS[1][:1], False), (CONVERSATIONS[1][:3], True)):
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
        assert text == before.render(messages, generation)


def test_arguments_of_the_template_travel_along(scored: Path):
    tokenizer = AutoTokenizer.from_pretrained(scored / "reward_model")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and not think %}{{ note }} {% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}\n"
        "{% if add_generation_prompt %}<|assistant|>{% if not think %}{{ note }} {% endif %}"
        "{% endif %}\n"
    )
    arguments = {"think": False, "note": 'it\'s\n"quoted"'}
    chat = ChatFormat.of(tokenizer, template_arguments=arguments)
    messages = CONVERSATIONS[0]
    text = tokenizer.apply_chat_template(
        messages, chat_template=classifier_template(chat), tokenize=False
    )
    prompt = chat.template.render(messages[:-1], True)
    assert prompt.endswith('<|assistant|>it\'s\n"quoted" ')
    assert text == prompt + messages[-1]["content"] + "<|end|>"


def test_text_that_leads_to_other_ids_is_refused(scored: Path, tmp_path: Path):
    folder = Path(shutil.copytree(scored / "reward_model", tmp_path / "rm"))
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(folder))
    tokenizer_file = folder / "tokenizer.json"
    backend = json.loads(tokenizer_file.read_text())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] != "<|user|>"]
    tokenizer_file.write_text(json.dumps(backend))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = []
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DenserlError, match="as other tokens than in training"):
        write_classifier(folder, chat)


@pytest.mark.parametrize("granularity", ["segment", "token"])
def test_a_dense_reward_model_is_no_classifier(granularity: str):
    record = RewardRecord(granularity, 0.5, "sum", "base", None, None, 5, {})  # type: ignore
    with pytest.raises(DenserlError, match=f"a {granularity} .* its score is the sum of"):
        check_possible(record)
