"""An answers file in the making: answers are kept as they are given, the file is whole or absent.

TARGET.progress lies beside the answers file: its first line says what made the answers, each
further line is one question's. When all are there, the answers file is written and the first line
stays, so that the same command knows what the file is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from denserl_cli.core.answers.formats import Answer, Benchmark, Identity, Question
from denserl_cli.core.answers.questions import rows_of
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.errors import DenserlError, refuse
from denserl_cli.core.runs.folder import Mode
from denserl_cli.core.runs.settings import differences
from denserl_cli.core.system.files import write_text

_FRESH = "name another file with --to, or write this one again with --fresh"


class AnswersFile:
    """The answers of one policy to one benchmark's questions."""

    def __init__(
        self,
        target: Path,
        benchmark: Benchmark,
        questions: Sequence[Question],
        settings: Mapping[str, Any],
    ) -> None:
        self.target, self.benchmark, self.questions = target, benchmark, questions
        self.settings = json.loads(json.dumps(settings))  # as a file gives them back
        self.progress = target.with_name(f"{target.name}.progress")
        self._ids = {question.id for question in questions}

    def admit(self, mode: Mode) -> bool:
        """Decide whether there is work to do; nothing is written.

        Returns False when the answers are finished. Raises DenserlError when they were interrupted
        and the user said neither --resume nor --fresh, when they were made otherwise, and when a
        file that is there is damaged or not known.
        """
        if self.target.suffix != self.benchmark.suffix:
            raise DenserlError(
                f"--to {self.target}: the answers of {self.benchmark.name} are a "
                f"{self.benchmark.suffix} file",
                hint=f"name a file that ends in {self.benchmark.suffix}",
            )
        if self.target.is_dir():
            raise DenserlError(f"--to {self.target} is a folder", hint="name a file")
        if mode == "fresh":
            return True
        if not self.progress.exists():
            self._refuse_unknown()
            return True
        made, _ = self._read()
        if made["settings"] != self.settings:
            changed = "; ".join(differences(made["settings"], self.settings))
            raise DenserlError(f"{self.target} holds other answers: {changed}", hint=_FRESH)
        if made["finished"] and self.target.exists():
            self._check_target()
            return False
        if mode == "start" and not made["finished"]:
            raise DenserlError(
                f"the answers in {self.target} were interrupted",
                hint="go on with --resume, or start again with --fresh",
            )
        return True

    def begin(self, mode: Mode) -> dict[Identity, Answer]:
        """Record what makes the answers; returns those that are there already."""
        answers: dict[Identity, Answer] = {}
        if mode == "resume" and self.progress.exists():
            _, answers = self._read()
        self._write_progress(answers, finished=False)
        return answers

    def add(self, answers: Mapping[Identity, Answer]) -> None:
        """Keep further answers."""
        with self.progress.open("a", encoding="utf-8") as file:
            file.writelines(_lines(answers))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, answers: Mapping[Identity, Answer], generator: str) -> None:
        """Write the answers file."""
        write_text(self.target, self.benchmark.write(self.questions, answers, generator))
        self._write_progress({}, finished=True)

    def _write_progress(self, answers: Mapping[Identity, Answer], *, finished: bool) -> None:
        head = json.dumps({"schema": 1, "finished": finished, "settings": self.settings})
        write_text(self.progress, "".join([head + "\n", *_lines(answers)]))

    def _read(self) -> tuple[dict[str, Any], dict[Identity, Answer]]:
        """The first line of the progress file and the answers after it.

        What follows the last line end was torn by a kill and is left out.
        """
        text = self.progress.read_text(encoding="utf-8", errors="replace")
        head, *lines = text.split("\n")[:-1] or [""]
        try:
            made = json.loads(head)
            _ = made["settings"], made["finished"]
        except (ValueError, KeyError, TypeError) as error:
            raise DenserlError(f"{self.progress}:1: damaged: {error}", hint=_FRESH) from error
        answers: dict[Identity, Answer] = {}
        problems = []
        for number, line in enumerate(lines, 2):
            try:
                name, answer = _parsed(line, self.benchmark.turns)
                problem = self._problem(name, name in answers)
            except (ValueError, KeyError, TypeError) as error:
                problem = f"no answer: {error!r}"
            if problem:
                problems.append(f"{self.progress}:{number}: {problem}")
            else:
                answers[name] = answer
        refuse(problems, _FRESH)
        return made, answers

    def _problem(self, name: Identity, seen: bool) -> str | None:
        """What is wrong with the identity of an answer."""
        shown = f"{self.benchmark.id_field} {str(name)[:60]!r}"
        if name not in self._ids:
            return f"answers no question: {shown}"
        return f"a second answer to {shown}" if seen else None

    def _refuse_unknown(self) -> None:
        """Raise DenserlError when there is an answers file that nothing is known about."""
        if self.target.exists():
            self._check_target()
            raise DenserlError(
                f"{self.target} is there already, and no {self.progress.name} says what made it",
                hint=_FRESH,
            )

    def _check_target(self) -> None:
        """Raise DenserlError unless the answers file has just one answer to each question."""
        problems, seen = [], set[Identity]()
        for row in rows_of(self.target):
            if isinstance(row, Skipped):
                problems.append(f"{row.origin}: {row.reason}: {row.detail}")
                continue
            name = row.fields.get(self.benchmark.id_field)
            if not isinstance(name, int | str):
                problems.append(f"{row.origin}: no {self.benchmark.id_field}")
                continue
            problem = self._problem(name, name in seen)
            problems += [f"{row.origin}: {problem}"] if problem else []
            seen.add(name)
        missing = len(self._ids - seen)
        if missing:
            problems.append(f"{self.target}: {missing} of {len(self._ids)} answers are missing")
        refuse(problems, _FRESH)


def _lines(answers: Mapping[Identity, Answer]) -> Iterator[str]:
    for name, answer in answers.items():
        yield json.dumps({"id": name, **answer._asdict()}) + "\n"


def _parsed(line: str, turns: int) -> tuple[Identity, Answer]:
    """One line of `_lines`. Raises ValueError, KeyError or TypeError for any other."""
    row = json.loads(line)
    said = row["turns"]
    if not isinstance(said, list) or list(map(type, said)) != [str] * turns:
        raise ValueError(f"turns is no list of {turns} texts")
    return row["id"], Answer(tuple(said), int(row["tokens"]), float(row["tstamp"]))
