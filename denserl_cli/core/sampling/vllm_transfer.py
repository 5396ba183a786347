"""How weights travel to a vLLM: a file on a CPU, shared memory of one GPU, NCCL between GPUs.

All three speak the protocol of vLLM's weight transfer: `init_weight_transfer_engine` once, then in
each update `update_weights` for every bucket (docs.vllm.ai, Weight Transfer). They need no vLLM in
this process.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Post = Callable[[str, dict[str, Any]], Any]
"""Sends a JSON object to a path of the server; returns its answer."""


class WeightTransfer(Protocol):
    """Carries buckets of weights to a server."""

    def connect(self) -> None:
        """Agree with the server on the transfer; once, before the first bucket."""

    def send(self, bucket: dict[str, Tensor]) -> None:
        """Carry one bucket, all of one type; it may be freed afterwards."""


class FileTransfer:
    """Each bucket is a file that a server on the same machine reads; for machines without GPUs."""

    def __init__(self, post: Post, folder: Path) -> None:
        self.post, self.file = post, folder / "bucket.safetensors"

    def connect(self) -> None:
        """Nothing needs to be agreed on."""
        self.post("/init_weight_transfer_engine", {"init_info": {}})

    def send(self, bucket: dict[str, Tensor]) -> None:
        """Write a bucket, have it read, and delete it."""
        from safetensors.torch import save_file

        save_file({name: _alone(weight) for name, weight in bucket.items()}, self.file)
        try:
            self.post("/update_weights", {"update_info": {"path": str(self.file)}})
        finally:
            self.file.unlink(missing_ok=True)


class IpcTransfer:
    """The server's worker maps the memory of the same GPU in which a bucket lies (CUDA IPC)."""

    def __init__(self, post: Post) -> None:
        self.post = post

    def connect(self) -> None:
        """Say that each weight has a handle of its own."""
        self.post("/init_weight_transfer_engine", {"init_info": {"packed": False}})

    def send(self, bucket: dict[str, Tensor]) -> None:
        """Share a bucket until the worker has copied it."""
        from torch.multiprocessing.reductions import reduce_tensor

        weights = [weight.contiguous() for weight in bucket.values()]
        gpu = str(torch.cuda.get_device_properties(weights[0].device).uuid)
        handles = [{gpu: reduce_tensor(weight)[1]} for weight in weights]
        torch.cuda.current_stream().synchronize()  # the worker reads on another stream
        pickled = base64.b64encode(pickle.dumps(handles)).decode()
        info = _about(bucket) | {"ipc_handles_pickled": pickled}
        self.post("/update_weights", {"update_info": info})
        torch.cuda.ipc_collect()


class NcclTransfer:
    """This process broadcasts each weight to all workers of a server on other GPUs."""

    def __init__(self, post: Post, workers: int) -> None:
        self.post, self.size = post, workers + 1
        self.communicator: Any = None

    def connect(self) -> None:
        """Meet the workers; a group of an earlier job is given up first."""
        from torch.cuda import nccl

        self.post("/shutdown_weight_transfer_engine", {})
        unique = nccl.unique_id()
        info = {
            "nccl_unique_id_b64": base64.b64encode(unique).decode(),
            "rank_offset": 1,
            "world_size": self.size,
            "packed": False,
        }
        with ThreadPoolExecutor(1) as elsewhere:  # the workers wait for this process meanwhile
            answer = elsewhere.submit(
                self.post, "/init_weight_transfer_engine", {"init_info": info}
            )
            self.communicator = nccl.init_rank(self.size, unique, 0)
            one = torch.ones(1, device="cuda")
            nccl.all_reduce([one], comms=[self.communicator])  # the workers' warm-up
            answer.result()

    def send(self, bucket: dict[str, Tensor]) -> None:
        """Broadcast a bucket's weights one by one, in the order that the server is told."""
        from torch.cuda import nccl

        with ThreadPoolExecutor(1) as elsewhere:
            answer = elsewhere.submit(self.post, "/update_weights", {"update_info": _about(bucket)})
            for weight in bucket.values():
                nccl.broadcast([weight.contiguous()], comms=[self.communicator])
            torch.cuda.current_stream().synchronize()
            answer.result()


def _alone(weight: Tensor) -> Tensor:
    """A weight in the CPU's memory, with no other one in the same piece of it."""
    weight = weight.contiguous().cpu()
    return weight.clone() if weight.untyped_storage().nbytes() > weight.nbytes else weight


def _about(bucket: dict[str, Tensor]) -> dict[str, Any]:
    """Names, types and shapes of a bucket's weights, as vLLM asks for them."""
    return {
        "names": list(bucket),
        "dtype_names": [str(weight.dtype).removeprefix("torch.") for weight in bucket.values()],
        "shapes": [list(weight.shape) for weight in bucket.values()],
    }
