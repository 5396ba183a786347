"""The processes of a job: who am I, what is my share, and sums over all of them.

One process needs none of it, and every function here is then free. Several processes are started by
torchrun, which says in the environment who is who.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_TIME_LIMIT = timedelta(hours=1)
"""How long a process waits for the others: the first one may make the sandbox alone."""
_ANSWER = timedelta(seconds=5)
"""How long the store through which the processes met has to answer."""
_PATIENCE = timedelta(days=30)
"""How long they wait where the first one may tokenise a whole data set."""


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes work on the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def first_to_fail(otherwise: bool = True) -> bool:
    """Whether no other process of the job has asked this before: whose error is to be shown.

    otherwise: the answer where the store through which the processes meet is not there.
    """
    if world_size() == 1:
        return True
    turn = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return bool(_store().add(f"denserl/failed/{turn}", 1) == 1)
    except RuntimeError:
        return otherwise


def _store() -> Any:
    """A line of our own to the store through which the processes met."""
    import torch

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(host, port, timeout=_ANSWER)


def join() -> None:
    """Meet the other processes of the job; does nothing in a job of one."""
    import torch

    if world_size() == 1 or torch.distributed.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    device = torch.device("cuda", local_rank()) if cuda else None
    # gloo beside nccl: small objects travel without a GPU
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    torch.distributed.init_process_group(backend, device_id=device, timeout=_TIME_LIMIT)


def join_alone() -> None:
    """Make a group of this one process, for libraries that need a group."""
    import torch

    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it


def leave() -> None:
    """Take leave of the other processes."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Return when every process has come this far."""
    import torch

    if world_size() > 1:
        torch.distributed.barrier()


def said_by_first_of_machine(work: Callable[[], T]) -> T:
    """What the first process of this machine finds out; the others wait for it.

    Nobody goes on before the first ones of all machines are done, however long they take; when one
    of them is gone, the others fail at once.
    """
    if world_size() == 1:
        return work()
    import torch

    patient = _patient_group()
    said: list[Any] = [None] * world_size()
    mine = work() if local_rank() == 0 else None
    torch.distributed.all_gather_object(said, mine, group=patient)
    return said[rank() - local_rank()]


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
