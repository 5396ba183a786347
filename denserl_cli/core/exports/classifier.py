"""A bandit reward model that any program reads as a classifier: its last logit is the score.

Programs render a conversation with the chat template, tokenise the text and take the logit of the
last token that is not padding. For that to be the score, the text has to end with the terminator,
which most templates do not do; the tokenizer must add nothing; and the padding must be another
token than the terminator, or the terminator would be skipped as padding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.exports.compatibility import write_config, write_tokenizer_config

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.models.reward_metadata import RewardRecord

_SAMPLE = (
    {"role": "user", "content": "Which of the two?"},
    {"role": "assistant", "content": "The second one."},
)
_WITHOUT = "export it without --as-classifier: its model card shows how to read the score"


def check_possible(record: RewardRecord) -> None:
    """Raise DenserlError unless the score is the value of the last token."""
    if record.granularity != "bandit":
        raise DenserlError(
            f"a {record.granularity} reward model is no classifier: its score is the "
            f"{record.aggregate} of the values at the ends of segments, and the last token, the "
            "terminator, belongs to none of them",
            hint=_WITHOUT,
        )


def write_classifier(folder: Path, chat: ChatFormat) -> None:
    """Make an exported bandit reward model one whose last token's logit is the score.

    Args:
        folder: The exported model with its tokenizer.
        chat: How the model was trained to read conversations.

    Raises:
        DenserlError: When the rendered text does not lead back to the ids of training, and when
            the tokenizer has no token to pad with.
    """
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    pad_id = padding_id(chat, rows)
    write_config(folder, pad_token_id=pad_id)
    pad = chat.template.tokenizer.convert_ids_to_tokens(pad_id)
    write_tokenizer_config(
        folder, pad_token=pad, add_bos_token=None, add_eos_token=None, chat_template=None
    )
    tokenizer_file = folder / "tokenizer.json"
    backend = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    backend["post_processor"] = None  # it may add a start token beside the template's
    tokenizer_file.write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(classifier_template(chat), encoding="utf-8")
    _check_ids(folder, chat)


def classifier_template(chat: ChatFormat) -> str:
    """A chat template that writes scored conversations as in training, up to the terminator.

    A conversation that ends with an answer becomes the prompt, as the original template writes it,
    the answer and the terminator. Anything else is left to the original template.
    """
    template = chat.template
    tokenizer = template.tokenizer
    slot = template.skeleton(("user", "assistant"), False).slots[-1]
    trim = {(True, True): ".strip()", (True, False): ".lstrip()", (False, True): ".rstrip()"}
    content = "messages[-1]['content']" + trim.get((slot.trim_left, slot.trim_right), "")
    arguments = {k: v for k, v in template.arguments.items() if k in template.variables}
    lines = [f"{{% set {name} = {value!r} %}}" for name, value in arguments.items()]
    lines += [
        "{% if messages and messages[-1]['role'] == 'assistant' and not add_generation_prompt %}",
        f"{{% set scored_answer = {content} %}}",
        "{% set messages = messages[:-1] %}",
        "{% set add_generation_prompt = true %}",
        "{% endif %}",
    ]
    end = tokenizer.convert_ids_to_tokens(chat.terminator_id)
    ending = f"{{%+ if scored_answer is defined %}}{{{{ scored_answer + {end!r} }}}}{{% endif %}}"
    return "\n".join([*lines, template.source.removesuffix("\n") + ending])


def padding_id(chat: ChatFormat, rows: int) -> int:
    """A token to pad with that conversations do not hold; the tokenizer's own where it can be.

    Args:
        chat: How conversations are written.
        rows: Embeddings of the model; ids from there on cannot be read.
    """
    tokenizer = chat.template.tokenizer
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    usual = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    used = {*chat.encode_prompt(_SAMPLE), chat.terminator_id}
    for token_id in (*usual, *reversed(special)):
        if token_id is not None and token_id < rows and token_id not in used:
            return int(token_id)
    raise DenserlError(
        "the tokenizer has no special token to pad with beside those of its chat template",
        hint=_WITHOUT,
    )


def _check_ids(folder: Path, chat: ChatFormat) -> None:
    """Raise DenserlError unless text from the exported template leads to the ids of training."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = tokenizer.apply_chat_template(list(_SAMPLE), tokenize=False)
    ids = chat.encode_prompt(_SAMPLE) + chat.encode_response(_SAMPLE[-1]["content"])
    if tokenizer(text)["input_ids"] != ids:
        raise DenserlError(
            "the tokenizer reads the text of a conversation as other tokens than in training",
            hint=_WITHOUT,
        )
