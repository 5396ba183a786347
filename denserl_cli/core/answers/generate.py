"""answer: a policy's answers to a benchmark's questions."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from denserl_cli.core.answers.answers_file import AnswersFile
from denserl_cli.core.answers.formats import Answer, Identity, Question
from denserl_cli.core.answers.job import Job
from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.data.batches import by_length
from denserl_cli.core.engine.frozen import LocalModel
from denserl_cli.core.errors import DenserlError, Interrupted, refuse
from denserl_cli.core.models.device import autocast, compute_dtype
from denserl_cli.core.models.lora import load_policy
from denserl_cli.core.sampling.base import Response, Sampling
from denserl_cli.core.sampling.sampler import make_sampler
from denserl_cli.core.sandbox.files import with_sandbox_files
from denserl_cli.core.system.signals import stop_requested

if TYPE_CHECKING:
    from torch import Tensor

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import Mode, RunFolder


def answer(recipe: Recipe, run: RunFolder, job: Job, mode: Mode, observer: Observer) -> bool:
    """Answer the questions of a job; returns False when that was done before.

    Raises Interrupted after Ctrl-C, with the answers of every finished batch kept.
    """
    file = AnswersFile(job.target, job.benchmark, job.questions, job.settings(recipe))
    if not file.admit(mode):
        return False
    generator = AnswerGenerator(with_sandbox_files(recipe, run, observer), job)
    if run.path in job.target.parents and not (run.path / "run.json").exists():
        run.claim()
    replaced = job.target.exists()
    answers = file.begin(mode)
    observer.begin(f"answer {job.benchmark.name}", len(job.questions), len(answers))
    with closing(generator.sampler), stop_requested() as stopping:
        for batch in generator.batches():
            if all(question.id in answers for question in batch):
                continue
            new = {name: a for name, a in generator.answer(batch).items() if name not in answers}
            file.add(new)
            answers |= new
            tokens = sum(answer.tokens for answer in new.values()) / len(new)
            observer.advance(len(new), tokens=tokens)
            if stopping() and len(answers) < len(job.questions):
                raise Interrupted(
                    f"stopped after {len(answers)} of {len(job.questions)} answers; they are in "
                    f"{file.progress}",
                    hint="go on with --resume",
                )
    observer.end()
    generator.report(observer)
    file.finish(answers, job.generator)
    if replaced:
        observer.notice(
            f"{job.target} was replaced; a judge that has judged {job.generator} before keeps its "
            "old score until you remove that"
        )
    return True


class AnswerGenerator:
    """A frozen policy and the encoded questions.

    Batches depend on the questions alone and not on which are answered already, so a resumed file
    equals that of a run that was never interrupted.
    """

    def __init__(self, recipe: Recipe, job: Job) -> None:
        self.job, self.seed = job, recipe.seed
        self.tokenizer, self.chat = load_chat(recipe)
        self.first_prompts = self._first_prompts()
        path = job.policy or recipe.model.path
        self.policy = load_policy(recipe, path)
        self.dtype = compute_dtype(recipe.model)
        self.context = getattr(self.policy.config, "max_position_embeddings", None)
        self.shortened = self.unfinished = self.refused = 0
        self._check(path)
        self.sampler = make_sampler(
            recipe,
            LocalModel(self.policy, self.dtype),
            pad_id=self.chat.pad_id,
            max_length=self._max_length(),
        )
        self.sampler.refresh()

    def batches(self) -> Iterator[list[Question]]:
        """Questions of one temperature and similar length, the longest first."""
        questions = self.job.questions
        groups: dict[float, list[int]] = {}
        for place, question in enumerate(questions):
            groups.setdefault(self._temperature(question), []).append(place)
        for places in groups.values():
            lengths = [len(self.first_prompts[questions[place].id]) for place in places]
            for part in by_length(lengths, np.array(places), self.job.batch_size):
                yield [questions[place] for place in part]

    def answer(self, batch: Sequence[Question]) -> dict[Identity, Answer]:
        """Answer questions of one temperature, turn by turn."""
        turns: list[list[str]] = [[] for _ in batch]
        tokens = [0] * len(batch)
        for turn in range(self.job.benchmark.turns):
            prompts = [self._prompt(q, replies) for q, replies in zip(batch, turns, strict=True)]
            rows_to_ask = [row for row, prompt in enumerate(prompts) if prompt is not None]
            asked = [(batch[row], prompts[row]) for row in rows_to_ask]
            drawn = dict(zip(rows_to_ask, self._sample(asked, turn), strict=True)) if asked else {}
            for row, replies in enumerate(turns):
                response = drawn.get(row)
                replies.append("" if response is None else self._text(response))
                tokens[row] += 0 if response is None else len(response.ids) - response.terminated
        now = time.time()
        return {
            question.id: Answer(tuple(replies), count, now)
            for question, replies, count in zip(batch, turns, tokens, strict=True)
        }

    def report(self, observer: Observer) -> None:
        """Say what was cut."""
        if self.shortened:
            observer.notice(
                f"{self.shortened} prompts were cut on the left to fit the model's context of "
                f"{self.context} tokens"
            )
        if self.unfinished:
            observer.notice(f"{self.unfinished} answers were cut at their length limit")
        if self.refused:
            observer.notice(
                f"{self.refused} later turns have an empty answer: the chat template cannot write "
                "the answer before them"
            )

    def _max_length(self) -> int:
        """The most tokens of a conversation and its answer; the model's context where it says."""
        if self.context is not None:
            return int(self.context)
        longest = max(map(len, self.first_prompts.values()))
        return longest + 2 * self.job.benchmark.turns * self.job.max_new_tokens

    def _temperature(self, question: Question) -> float:
        given = self.job.temperature
        return self.job.benchmark.temperature(question) if given is None else given

    def _first_prompts(self) -> dict[Identity, list[int]]:
        """Ids of the first turn of each question."""
        layouts, problems = [], []
        for question in self.job.questions:
            try:
                turn = {"role": "user", "content": question.turns[0]}
                layouts.append(self.chat.prompt_layout([turn]))
            except DenserlError as error:
                problems.append(f"{question.origin}: {error.message}")
        refuse(problems, "mend the question, or name another tokenizer in model.tokenizer")
        encoded = self.chat.tokenize(layouts)
        return {q.id: one.ids for q, one in zip(self.job.questions, encoded, strict=True)}

    def _prompt(self, question: Question, replies: Sequence[str]) -> np.ndarray | None:
        """Ids of the conversation so far, cut on the left where it leaves no room for an answer.

        None where the template rewrites an earlier answer.
        """
        ids = self.first_prompts[question.id]
        if replies:
            turns = [{"role": "user", "content": question.turns[0]}]
            for answer, following in zip(replies, question.turns[1:], strict=False):
                turns.append({"role": "assistant", "content": answer})
                turns.append({"role": "user", "content": following})
            try:
                ids = self.chat.encode_prompt(turns)
            except DenserlError:
                self.refused += 1
                return None
        if self.context is not None:
            longest = self.context - min(self.job.max_new_tokens, self.context // 4)
            self.shortened += len(ids) > longest
            ids = ids[-longest:]
        return np.array(ids, np.int32)

    def _sample(self, asked: Sequence[tuple[Question, Any]], turn: int) -> list[Response]:
        most = self.job.max_new_tokens
        prompts = [prompt for _, prompt in asked]
        limits = [
            most if self.context is None else min(most, self.context - len(prompt))
            for prompt in prompts
        ]
        temperature = self._temperature(asked[0][0])
        keys = [(self.seed, _question_seed(question.id), turn) for question, _ in asked]
        sampling = Sampling(most, self.chat.stop_ids, temperature)
        return self.sampler.sample(prompts, keys, sampling, limits=limits)

    def _text(self, response: Response) -> str:
        """An answer's text: without its terminator, and without white space around it."""
        self.unfinished += not response.terminated
        ids = response.ids[:-1] if response.terminated else response.ids
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    @torch.no_grad()
    def _check(self, path: str) -> None:
        """Raise DenserlError when the tokenizer does not fit the policy, or its logits are NaN."""
        rows = len(cast("Tensor", self.policy.get_input_embeddings().weight))
        highest = max(self.chat.token_ids())
        if highest >= rows:
            raise DenserlError(
                f"{path}: the tokenizer has ids up to {highest}, the policy {rows} embeddings",
                hint="name the policy's own tokenizer: --set model.tokenizer=FOLDER",
            )
        ids = next(iter(self.first_prompts.values()))
        start = torch.tensor([ids[:16]], device=self.policy.device)
        with autocast(self.policy.device, self.dtype):
            logits = self.policy(input_ids=start, use_cache=False).logits
        if logits.isnan().any():
            raise DenserlError(
                f"{path}: the policy's logits are NaN", hint="its weights are damaged; name another"
            )


def _question_seed(name: Identity) -> int:
    """A seed for a question that does not depend on its place in the file."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8])
