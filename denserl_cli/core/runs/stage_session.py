"""A stage at work in its run folder: where it starts, what it records, when it saves or stops.

Both trainers' loops are driven by one of these, so that signals, checkpoints, metrics and resuming
are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from denserl_cli.core.data.skipped import list_skipped
from denserl_cli.core.engine.random_state import random_state, restore_random_state
from denserl_cli.core.errors import Interrupted, ServiceError
from denserl_cli.core.runs.failures import NonFiniteGuard
from denserl_cli.core.system.distributed import all_gather_object, any_rank, rank, world_size
from denserl_cli.core.system.signals import stop_requested

if TYPE_CHECKING:
    from denserl_cli.core.data.skipped import Skipped
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.runs.checkpoints import Checkpoint
    from denserl_cli.core.runs.folder import Mode, RunFolder

Metrics = dict[str, Any]
"""Numbers, and lists of them, by name: what a line of metrics.jsonl holds."""
Sample = dict[str, Any]
"""A response with its segments: what a line of samples.jsonl holds."""


class HasState(Protocol):
    """Something that a checkpoint holds beside the engines."""

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""


class StageSession:
    """Progress, records, checkpoints and the orderly stop of one stage."""

    def __init__(
        self,
        stage: str,
        run: RunFolder,
        observer: Observer,
        *,
        engines: Mapping[str, Engine],
        unit: str,
        total: int,
        save_every: int,
        headline: Sequence[str],
    ) -> None:
        """Prepare a stage; nothing is written yet.

        Args:
            stage: Its name.
            run: The folder that it works in.
            observer: Sees progress and metrics.
            engines: What trains the models, by name.
            unit: What a step is called in messages: step or iteration.
            total: Steps in all.
            save_every: Steps between checkpoints.
            headline: Metrics beside the progress bar; those of reward functions are added.
        """
        self.stage, self.run, self.observer = stage, run, observer
        self.engines, self.unit, self.total = dict(engines), unit, total
        self.save_every, self.headline = save_every, tuple(headline)
        self.guard = NonFiniteGuard(stage, run, observer)
        self.trainer: HasState | None = None
        self._stopping: Callable[[], bool] = lambda: False

    def start(self, mode: Mode, skipped: Sequence[Skipped] = ()) -> int:
        """Put the start on record and restore the latest checkpoint.

        Args:
            mode: What to do with an earlier attempt.
            skipped: Rows that the stage cannot use, listed in the run folder.

        Returns:
            The step after which to go on, 0 at the beginning.
        """
        checkpoint = self.run.started(self.stage, mode, self.observer, self.total)
        list_skipped(skipped, self.run.skipped_file(self.stage), self.observer)
        if checkpoint is None:
            return 0
        self.restore(checkpoint)
        self.observer.notice(f"resuming after {self.unit} {checkpoint.step} of {self.total}")
        return checkpoint.step

    @contextmanager
    def steps(self, start: int) -> Iterator[range]:
        """Yield the numbers of the steps after `start`; `finish_step` answers a signal inside."""
        with stop_requested() as self._stopping:
            yield range(start + 1, self.total + 1)
        self.observer.end()

    @contextmanager
    def interruptible(
        self, title: str, total: int, finished: int
    ) -> Iterator[Callable[[int], None]]:
        """Show a long part of a step, which Ctrl-C leaves with the state of the step before.

        So does a service that fails, in all processes alike.

        Args:
            title: What is done.
            total: Pieces of it.
            finished: The last step that is finished.

        Yields:
            A function to call with the number of pieces that have just been done.
        """

        def advance(count: int) -> None:
            self.observer.advance(count)
            if world_size() == 1 and self._stopping():  # several processes agree between steps
                raise self.interrupted(finished)

        self.observer.begin(title, total=total)
        try:
            yield advance
        except ServiceError as error:
            raise self.without_service(error, finished) from error
        self.observer.end()

    def record(self, step: int, metrics: Metrics, samples: Sequence[Sample] = ()) -> None:
        """Write metrics and samples, and show the headline; step 0 is the state before training."""
        self.run.log(self.stage, step, metrics)
        for sample in samples:
            self.run.log(self.stage, step, sample, file="samples.jsonl")
        functions = [name for name in metrics if name.startswith("reward_")]
        shown = {n: metrics[n] for n in (*functions, *self.headline) if n in metrics}
        self.observer.advance(1 if step else 0, **shown)

    def finish_step(
        self, step: int, metrics: Metrics, samples: Sequence[Sample] = (), *, last: bool = False
    ) -> bool:
        """Record a step, checkpoint where it is due, and stop where a signal asks for it.

        Args:
            step: Its number, from 1.
            metrics: Of this step.
            samples: Of this step.
            last: Training ends here, although steps are left.

        Returns:
            Whether training is over.

        Raises:
            Interrupted: A signal came; the state after this step is in a checkpoint.
        """
        last = last or step == self.total
        self.record(step, metrics | self.guard.metrics(), samples)
        stop = any_rank(self._stopping())
        if stop and not last:
            raise self.interrupted(step)
        if step % self.save_every == 0 or last:
            self.save(step)
        return last

    def interrupted(self, step: int) -> Interrupted:
        """Checkpoint the state after `step`; returns the error that ends the command."""
        self.save(step)
        self.observer.end()
        return Interrupted(
            f"stopped after {self.unit} {step} of {self.total}; the state is in {self.run.path}",
            hint="go on with --resume",
        )

    def without_service(self, error: ServiceError, step: int) -> ServiceError:
        """Checkpoint the state after `step`; returns the error, which says so."""
        self.save(step)
        self.observer.end()
        return ServiceError(
            f"{error.message}\nstopped after {self.unit} {step} of {self.total}; the state is in "
            f"{self.run.path}",
            hint=error.hint,
        )

    def save(self, step: int) -> None:
        """Write everything that resuming needs; data and noise follow from the step."""
        state: dict[str, Any] = {n: engine.state() for n, engine in self.engines.items()}
        state |= {"random": all_gather_object(random_state()), "guard": self.guard.state()}
        if self.trainer is not None:
            state |= self.trainer.state()
        self.run.save_checkpoint(self.stage, step, state, self.engines)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over what `save` wrote."""
        state = checkpoint.state
        for name, engine in self.engines.items():
            engine.restore(state[name])
            engine.load_shards(checkpoint.folder / name)
        # another number of processes may go on: what is trained does not draw from these
        restore_random_state(state["random"][rank() % len(state["random"])])
        self.guard.restore(state["guard"])
        if self.trainer is not None:
            self.trainer.restore(state)
