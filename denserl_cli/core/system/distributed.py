"""The processes of a job: who am I, what is my share, and sums over all of them.

One process needs none of it, and every function here is then free. Several processes are started by
torchrun, which says in the environment who is who.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_MEETING = timedelta(minutes=5)
"""How long the processes of a job, once their launchers have met, wait for each other to start."""
_TIME_LIMIT = timedelta(hours=1)
"""How long a process waits for the others: the first one may make the sandbox alone."""
_ANSWER = timedelta(seconds=5)
"""How long the store through which the processes met has to answer."""
_PATIENCE = timedelta(days=30)
"""How long they wait where the first one may tokenise a whole data set."""


class PeerLostError(DenserlError):
    """What a process has to say that fails because another one has gone."""

    exit_code = 1

    def __init__(self) -> None:
        super().__init__(
            "the connection to another process of the job is lost: it failed or was killed",
            hint="--resume goes on from the last checkpoint",
        )


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes work on the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of the job share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def is_local_main_process() -> bool:
    """Whether this is the process that works for all of its machine; the first call meets all."""
    return rank() == _local_main_rank(rank(), _places())


def several_machines() -> bool:
    """Whether the job's processes are on several machines; the first call meets all."""
    return len({machine for machine, _ in _places()}) > 1


def _local_main_rank(rank: int, places: Sequence[tuple[str, int]]) -> int:
    """Of the processes on the machine of `rank`, the one with the lowest local rank.

    Which ranks share a machine does not follow from the local ranks: launchers count them
    differently where machines have different numbers of processes.
    """
    here = [number for number, place in enumerate(places) if place[0] == places[rank][0]]
    return min(here, key=lambda number: (places[number][1], number))


@cache
def _places() -> list[tuple[str, int]]:
    """Machine and local rank of every process, by rank."""
    return all_gather_object((_machine(), local_rank()))


def _machine() -> str:
    """What tells this machine from others: its name, and, where names repeat, its boot."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot}"
    return socket.gethostname()


def first_to_fail(otherwise: bool = True) -> bool:
    """Whether no other process of the job has asked this before: whose error is to be shown.

    otherwise: the answer where the store through which the processes meet is not there.
    """
    if world_size() == 1:
        return True
    try:
        return bool(_store().add(_key("failed"), 1) == 1)
    except RuntimeError:
        return otherwise


def _store(timeout: timedelta = _ANSWER, *, serves: bool = False) -> Any:
    """A connection of our own to the store through which the processes meet."""
    import torch

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(
        host, port, is_master=serves, timeout=timeout, wait_for_workers=False
    )


def _key(name: str) -> str:
    """A key of the store, another one each time that torchrun starts the processes again."""
    return f"denserl/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def join() -> None:
    """Meet the other processes of the job; does nothing in a job of one.

    Raises:
        DenserlError: some of them did not come within `_MEETING`, or failed before they came.
    """
    import torch

    if world_size() == 1 or torch.distributed.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    device = torch.device("cuda", local_rank()) if cuda else None
    # gloo beside nccl: small objects travel without a GPU
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    torch.distributed.init_process_group(
        backend,
        store=_meet(),
        rank=rank(),
        world_size=world_size(),
        device_id=device,
        timeout=_TIME_LIMIT,
    )


def _meet() -> Any:
    """The store that the processes share, once all of them are there."""
    from torch.distributed import DistError, PrefixStore

    try:
        store = _store(_MEETING, serves=rank() == 0 and not _agent_serves())
        store.set(_key(f"here/{rank()}"), "")
        store.add(_key("here"), 1)
        until = time.monotonic() + _MEETING.total_seconds()
        while store.add(_key("here"), 0) < world_size():
            if store.add(_key("failed"), 0):
                raise PeerLostError
            if time.monotonic() > until:
                raise _missing(store)
            time.sleep(0.2)
    except DistError as error:
        raise PeerLostError from error
    return PrefixStore(_key("group"), store)


def _agent_serves() -> bool:
    """Whether torchrun's own store, through which the launchers met, serves the processes too."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _missing(store: Any) -> DenserlError:
    absent = [str(one) for one in range(world_size()) if not store.check([_key(f"here/{one}")])]
    return DenserlError(
        f"of {world_size()} processes, {', '.join(absent)} did not come within "
        f"{_MEETING.total_seconds():.0f} seconds",
        hint="see what the machines of these processes say, and whether all can reach "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
    )


def join_alone() -> None:
    """Make a group of this one process, for libraries that need a group."""
    import torch

    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it


def leave() -> None:
    """End this process's part of the process group."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Return when every process has come this far."""
    import torch

    if world_size() > 1:
        torch.distributed.barrier()


def from_local_main_process(work: Callable[[], T]) -> T:
    """What the first process of this machine finds out; the others wait for it.

    Nobody goes on before the first ones of all machines are done, however long they take; when one
    of them is gone, the others fail at once.
    """
    if world_size() == 1:
        return work()
    import torch

    patient = _patient_group()
    found: list[Any] = [None] * world_size()
    mine = work() if is_local_main_process() else None
    torch.distributed.all_gather_object(found, mine, group=patient)
    return found[_local_main_rank(rank(), _places())]


@cache
def _patient_group() -> Any:
    """All processes once more, who wait for each other for as long as their connections last."""
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process do something alone; the others do it when it has finished."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in some process."""
    return any(all_gather_object(flag)) if world_size() > 1 else flag


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place; each must call with the same shape."""
    import torch

    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """The largest of a tensor over all processes, in place, element by element."""
    import torch

    if world_size() > 1:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values


def all_gather_object(mine: T) -> list[T]:
    """What each process passed, in the order of the ranks."""
    import torch

    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def broadcast_object(value: T) -> T:
    """What the first process passed."""
    import torch

    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def rounds(parts: Sequence[T]) -> list[list[T]]:
    """The parts that all processes work on side by side, turn by turn.

    Neighbours, which are of similar length, go to different processes. Where there are too few for
    the last turn, some early parts come again.
    """
    ranks = world_size()
    return [
        [parts[place % len(parts)] for place in range(start, start + ranks)]
        for start in range(0, len(parts), ranks)
    ]


def shard_micro_batches(parts: Sequence[T]) -> list[tuple[T, bool]]:
    """The parts that fall to this process, and whether each one counts.

    Every process gets the same number, for each part is a collective call where weights are
    sharded: those that come again in the last turn do not count.
    """
    places = range(rank(), rank() + len(parts), world_size())
    return [
        (turn[rank()], place < len(parts))
        for place, turn in zip(places, rounds(parts), strict=True)
    ]
