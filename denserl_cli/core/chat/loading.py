"""A recipe's tokenizer and chat format, and whether they fit a checkpoint, before any weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.chat.tokenizer_file import read_tokenizer
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.hub import readable_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import ModelConfig, Recipe


def check_vocabulary(
    chat: ChatFormat, path: str, revision: str | None = None, *, what: str = "starting model"
) -> None:
    """Raise DenserlError when conversations may hold ids that a model has no embedding for.

    An embedding with more rows than the tokenizer has tokens is fine: many are padded. So are
    special tokens beyond the embedding that neither the template nor generation uses. what: the
    kind of model, for errors.
    """
    from transformers import AutoConfig

    with readable_errors(path, what):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    config = config.get_text_config()
    rows = config.vocab_size
    tokenizer = chat.template.tokenizer
    beyond = sorted(i for i in chat.token_ids() if i >= rows)
    if beyond:
        first = tokenizer.convert_ids_to_tokens(beyond[0])
        raise DenserlError(
            f"the tokenizer {tokenizer.name_or_path} does not fit the {what} {path}: {len(beyond)} "
            f"of its ids, from {beyond[0]} ({first!r}) on, are beyond the {rows} embeddings",
            hint="name the model's own tokenizer in model.tokenizer, or leave that out",
        )


def load_chat(
    recipe: Recipe, observer: Observer | None = None
) -> tuple[PreTrainedTokenizerBase, ChatFormat]:
    """The recipe's tokenizer and how it writes conversations.

    observer: told what the template writes before every answer, and of a tokenizer that other
    programs misread. Raises DenserlError when the tokenizer does not fit the recipe or the model.
    """
    tokenizer = load_tokenizer(recipe.model, observer)
    chat = chat_of(recipe, tokenizer)
    check_vocabulary(chat, recipe.model.path, recipe.model.revision)
    if observer is not None and chat.answer.beginning:
        observer.notice(f"chat format: {chat}")
    return tokenizer, chat


def load_tokenizer(model: ModelConfig, observer: Observer | None = None) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer. observer: told as `read_tokenizer` says."""
    path = model.tokenizer or model.path
    with readable_errors(path, "tokenizer", "model.tokenizer" if model.tokenizer else "model.path"):
        revision = model.revision if path == model.path else None
        return read_tokenizer(path, revision, observer)


def chat_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """How a tokenizer writes the recipe's conversations. Raises as `load_chat` does."""
    return ChatFormat.of(
        tokenizer,
        terminator=recipe.chat.terminator,
        stop_tokens=recipe.chat.stop_tokens,
        template_arguments=recipe.chat.template_arguments,
        prompt_ending=recipe.chat.prompt_ending,
    )
