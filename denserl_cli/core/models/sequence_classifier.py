"""Published scalar reward models of any kind, which reward whole responses (granularity bandit).

Such a model may have another tokenizer, chat template and head than the policy. A conversation is
written in the model's own format and read once, as transformers does, and its value is that of the
response's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from denserl_cli.core.chat.format import ChatFormat, Layout
from denserl_cli.core.chat.tokenizer_file import read_tokenizer
from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.data.conversations import Prompt
from denserl_cli.core.data.encoding import PromptEncoding
from denserl_cli.core.data.skipped import Skipped, check_usable
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.placement import Placement
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.models.weights import load_weights
from denserl_cli.core.system.hub import readable_errors, weight_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.models.reward_metadata import RewardRecord
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import ModelConfig

Ids = np.ndarray
Rewrite = Callable[[Ids, Ids], Ids]
"""From the ids of a prompt and its response to the conversation in the reward model's ids."""


class WholeFormat(ChatFormat):
    """A chat format that writes everything after a response, as a template does, not one token."""

    to_the_end = True

    def response_layout(self, content: str) -> Layout:
        """What `encode_response` tokenises; any text will do, for policies write anything."""
        answered = (*self.answer.roles, "assistant")
        slot = self.template.skeleton(answered, False).slots[-1]
        skeleton, contents = self._prompt([{"role": r, "content": "?"} for r in answered[:-1]])
        return self._answer(slot.trim(content), skeleton.joined(contents))

    def _has_control(self, content: str) -> bool:
        return self.control.pattern.search(content) is not None


def as_it_is(prompt: Ids, response: Ids) -> Ids:
    """The conversation, where the policy's ids are the reward model's as well."""
    return np.concatenate([prompt, response])


def load_classifier(record: RewardRecord, model: ModelConfig) -> Any:
    """Load the published weights of a record, frozen. Raises DenserlError when they lack a head."""
    from transformers import AutoModelForSequenceClassification

    assert record.weights is not None
    loaded = load_weights(
        AutoModelForSequenceClassification,
        model,
        record.weights,
        revision=record.weights_revision,
        trained=False,
        what="reward model",
        placement=Placement(torch.float32),  # heads of this kind are not cast apart from the body
        num_labels=1,
        option="published.reward_model",
        causal=False,
    )
    loaded.config.pad_token_id = None  # so that transformers reads the last token
    return loaded


class SequenceReader:
    """Reads the value of whole conversations from a classifier with one label."""

    def __init__(
        self,
        *,
        plain_head: bool,
        rewrite: Rewrite = as_it_is,
        limit: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Set up a reader.

        Args:
            plain_head: Whether the head `score` is a matrix product of each token's state.
            rewrite: From the policy's ids to the classifier's.
            limit: Tokens that the classifier can read; None: any number.
            observer: Told when a conversation is longer than that.
        """
        self.plain_head, self.rewrite = plain_head, rewrite
        self.limit, self.observer, self.cut = limit, observer, 0

    @torch.no_grad()
    def __call__(self, model: Any, batch: SequenceBatch) -> Tensor:
        """The value of each of R conversations at its response's last token.

        Args:
            model: The classifier.
            batch: Of R sequences, in the policy's ids.

        Returns:
            (R, T), float32, 0 at all other tokens.
        """
        lengths = batch.response_mask.sum(1)
        values = torch.zeros(batch.response_mask.shape, device=lengths.device)
        values[torch.arange(len(values)), lengths - 1] = self.scores(model, batch.rows())
        return values

    def scores(self, model: Any, conversations: Sequence[tuple[Ids, Ids]]) -> Tensor:
        """The value of each conversation, a prompt and a response of the policy's ids: (N,)."""
        return self.read(model, [self._within(self.rewrite(*ids)) for ids in conversations])

    def read(self, model: Any, rows: Sequence[Ids]) -> Tensor:
        """The value of each conversation of the classifier's ids: (R,), float32."""
        device = model.device
        if self.plain_head:
            batch = collate_sequences([r[:-1] for r in rows], [r[-1:] for r in rows], 0, device)
            return token_values(model, batch)[:, 0]
        inputs = [torch.from_numpy(row.astype(np.int64))[None].to(device) for row in rows]
        with torch.autocast(device.type, enabled=False):  # alone: padding disturbs some heads
            return torch.cat([model(input_ids=ids).logits[:, 0] for ids in inputs])

    def _within(self, ids: Ids) -> Ids:
        """The last ids, as many as the model has positions."""
        if self.limit is None or len(ids) <= self.limit:
            return ids
        self.cut += 1
        if self.observer is not None and self.cut in (10**k for k in range(12)):
            self.observer.notice(
                f"{self.cut} conversations so far were cut on the left to the {self.limit} tokens "
                "that the reward model can read"
            )
        return ids[-self.limit :]


class Translation:
    """Rewrites the policy's ids as a conversation of the reward model's own format."""

    def __init__(
        self, chat: ChatFormat, reward_chat_format: ChatFormat, prompts: Sequence[Prompt]
    ) -> None:
        """Encode all prompts in the reward model's format.

        Args:
            chat: Of the policy.
            reward_chat_format: Of the reward model.
            prompts: All that will be rewritten, in the policy's ids.

        Raises:
            DenserlError: The reward model's template refuses a prompt.
        """
        self.chat, self.reward_chat_format = chat, reward_chat_format
        self.prompts: dict[bytes, Ids] = {}
        refused = []
        encoded = PromptEncoding(reward_chat_format, 2**31).encode(prompts)
        for prompt, own in zip(prompts, encoded, strict=True):
            if isinstance(own, Skipped):
                refused.append(own)
            else:
                self.prompts[prompt.ids.tobytes()] = own.ids
        check_usable(len(self.prompts), refused, strict=True)

    def __call__(self, prompt: Ids, response: Ids) -> Ids:
        """The conversation in the reward model's ids."""
        if len(response) and int(response[-1]) in self.chat.stop_ids:
            response = response[:-1]
        tokenizer = self.chat.template.tokenizer
        text = str(tokenizer.decode(response, clean_up_tokenization_spaces=False))
        own = self.prompts[prompt.astype(np.int32).tobytes()]
        layout = self.reward_chat_format.response_layout(text)
        answer = self.reward_chat_format.tokenize([layout])[0]
        return np.concatenate([own[: len(own) - answer.overlap], answer.ids])


def own_tokenizer(record: RewardRecord) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a published reward model's weights, if there is one."""
    if record.weights is None:
        return None
    return _tokenizer_beside(record.weights, record.weights_revision, "published.reward_model")


def _tokenizer_beside(
    path: str, revision: str | None, option: str
) -> PreTrainedTokenizerBase | None:
    from transformers.utils import cached_file

    with readable_errors(path, "tokenizer", option):
        names = ("tokenizer_config.json", "tokenizer.json")
        if not any(
            cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            for name in names
        ):
            return None
        return read_tokenizer(path, revision)


def check_critic(path: str, chat: ChatFormat) -> None:
    """Raise DenserlError when a critic's folder or hub name has another tokenizer than the policy.

    One without a tokenizer beside it is taken to have the policy's.
    """
    own = _tokenizer_beside(path, None, "ppo.critic_init")
    if own is not None and not _same_ids(chat.template.tokenizer, own):
        raise DenserlError(
            f"ppo.critic_init: {path} has another tokenizer than the policy, so it cannot judge "
            "its tokens",
            hint="name a critic or reward model of the same tokenizer, or policy",
        )


def reads_ids_of(record: RewardRecord, chat: ChatFormat) -> bool:
    """Whether a reward model gives every token of the policy's tokenizer the same id."""
    own = own_tokenizer(record)
    return own is None or _same_ids(chat.template.tokenizer, own)


def own_format(record: RewardRecord, chat: ChatFormat) -> ChatFormat | None:
    """The chat format of a published bandit model, where it differs from the policy's; else None.

    Raises DenserlError when the model has other tokens and no chat template.
    """
    own = own_tokenizer(record) if record.granularity == "bandit" else None
    ours = chat.template.tokenizer
    if own is None:
        return None
    if _same_ids(ours, own) and own.chat_template in (None, ours.chat_template):
        return None
    if not own.chat_template:
        raise DenserlError(
            f"the tokenizer of the reward model {record.weights} has no chat template",
            hint="save one into its folder: set tokenizer.chat_template, then save_pretrained",
        )
    return WholeFormat.of(own)


def has_plain_head(path: str, revision: str | None = None) -> bool:
    """Whether a classifier is a causal model whose head `score` is a plain matrix product."""
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with readable_errors(path, "reward model", "published.reward_model"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return False
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config)
    head = getattr(model, "score", None)
    return isinstance(head, nn.Linear) and head.bias is None


def check_head(path: str, revision: str | None = None) -> None:
    """Raise DenserlError when a published model's weights lack a head; no weights are loaded."""
    if not has_plain_head(path, revision):
        return  # its head has another name; loading finds out whether it is missing
    with readable_errors(path, "reward model", "published.reward_model"):
        names = weight_names(path, revision)
    if names is not None and not any("score" in name for name in names):
        raise DenserlError(
            f"{path} lacks weights of the reward model: score.weight",
            hint="name a folder that has a whole reward model: --set published.reward_model=FOLDER",
        )


def positions(model: Any) -> int | None:
    """How many tokens a model can read; None where its configuration does not say."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    for table in model.modules():  # RoBERTa counts positions from the padding's index on
        if isinstance(table, nn.Embedding) and table.num_embeddings == limit and table.padding_idx:
            return limit - table.padding_idx - 1
    return limit


def _same_ids(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    known = theirs.get_vocab()
    return all(known.get(token) == i for token, i in ours.get_vocab().items())
