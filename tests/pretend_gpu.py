"""A GPU that is not there: tensors that say cuda:0 and compute on the CPU.

    with pretend_gpu() as gpu:
        ...                       # torch.cuda.is_available(), tensors and autocast say CUDA
    gpu.syncs                     # by what waits for the device, and the line of denserl that asks

A process can do so that was started with `environment()`: torch built for the CPU has no place for
a CUDA device, and `pretend_gpu.cpp` makes one before torch looks. An operation on tensors of two
devices raises as CUDA's would. Streams, kernels, their numbers and their memory are not pretended.
Nothing of it is undone for models that outlive the block.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
"""Operations whose result's size or value the host must know."""
ACROSS = {"copy_", "_to_copy", "set_", "_fused_adamw_", "is_same_size"}
"""Operations that may take tensors of two devices; fused AdamW's step counters are checked."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class DeviceFaultError(RuntimeError):
    """An operation took tensors of two devices."""


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; `held` is where its numbers are.

    Assigning `data` may move it to the CPU, as it may a real one.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device = CUDA) -> OnGpu:
        """Wrap a tensor of the CPU."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=device,
        )
        made.held = held.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, words: Any = (), options: Any = None):
        """Without the mode, as in a thread of autograd."""
        return _ACTIVE[-1].run(operation, words, options or {})

    @property
    def data(self) -> torch.Tensor:
        """The same numbers outside autograd."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, OnGpu):
            value = OnGpu(value, CPU)
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy, a parameter where this is one."""
        if id(self) not in memo:
            copied: Any = OnGpu(self.held.clone(), self.device)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a tensor of the CPU."""
        return self.held.__reduce_ex__(protocol)

    def __getitem__(self, index: Any) -> Any:
        """Indices of the CPU are moved here before torch would do it past every mode."""
        return super().__getitem__(_moved(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        """As `__getitem__`."""
        super().__setitem__(_moved(index), value)

    def __repr__(self, *_: Any, **__: Any) -> str:
        """Without the numbers, for which the host would wait."""
        return f"OnGpu({self.device}, {tuple(self.shape)}, {self.dtype})"

    def __format__(self, how: str) -> str:
        """As a tensor's."""
        return format(self.item(), how) if self.dim() == 0 else repr(self)

    def tolist(self) -> Any:
        """The numbers, for which the host waits."""
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> np.ndarray:
        """Of the numbers, where they are the CPU's."""
        if self.is_cuda:
            raise DeviceFaultError(f"numpy of a tensor on the GPU: {_line()}")
        return self.held.numpy(**options)

    def record_stream(self, stream: Any) -> None:
        """There is one stream."""

    def data_ptr(self) -> int:
        """Where the numbers are."""
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        """Of the numbers."""
        return self.held.untyped_storage()


class PretendedGpu(TorchDispatchMode):
    """What happens on the pretended GPU.

    Attributes:
        syncs: How often the host waits, by (what for, line of denserl).
        launches: Operations on the GPU, by (name, line of denserl).
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.recording: Graph | None = None

    def __torch_dispatch__(self, operation: Any, types: Any, words: Any = (), options: Any = None):
        """Run an operation on the CPU."""
        return self.run(operation, words, options or {})

    def run(self, operation: Any, words: Any, options: dict[str, Any]) -> Any:
        """Check the devices, count, compute, and wrap what is on the GPU."""
        name = operation._schema.name.split("::")[-1]
        if name in ("_pin_memory", "pin_memory"):
            return words[0]
        if name == "is_pinned":
            return False
        tensors = [x for x in tree_flatten((words, options))[0] if isinstance(x, torch.Tensor)]
        device = self.place(name, words, tensors)
        target = options.get("device")
        if target is not None:
            device = torch.device(target)
        if CUDA.type in {x.device.type for x in tensors} | {device.type}:
            self.count(name, words, device)
        options = {key: value for key, value in options.items() if key != "pin_memory"}
        plain = tree_map(_held, words), tree_map(_on_cpu, tree_map(_held, options))
        if name == "mm" and operation._overloadname.startswith("dtype"):
            operation = _mixed_product
        elif self.recording:
            self.recording.keep(operation, *plain)
        result = operation(*plain[0], **plain[1])
        if self.recording:
            self.recording.steps.append((name, operation, *plain, result))
        own = {id(x.held): x for x in tensors if isinstance(x, OnGpu)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in own:
                return own[id(value)]
            return OnGpu(value) if device.type == "cuda" else value

        return tree_map(wrap, result)

    @contextlib.contextmanager
    def record(self, graph: Graph, **_: Any) -> Iterator[None]:
        """torch.cuda.graph: what stands inside is recorded, not done."""
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
            graph.undo()

    def place(self, name: str, words: Any, tensors: list[torch.Tensor]) -> torch.device:
        """The device of an operation; numbers without a dimension may come from the CPU."""
        checked = tensors
        if name in INDEXING:
            if words[0].device.type == "cpu" and any(x.device.type == "cuda" for x in tensors):
                raise DeviceFaultError(f"{name} of a CPU tensor with what is on the GPU: {_line()}")
            checked = [words[0]]  # CPU indices may go into CUDA tensors
        wide = {x.device.type for x in checked if x.dim()}
        any_cuda = any(x.device.type == "cuda" for x in checked)
        mixed = len(wide) > 1 or (any_cuda and wide == {"cpu"})
        if mixed and name not in ACROSS:
            raise DeviceFaultError(f"{name} of tensors on cpu and cuda: {_line()}")
        if name in ACROSS and tensors:
            return tensors[0].device
        return CUDA if "cuda" in wide or (any_cuda and not wide) else CPU

    def count(self, name: str, words: Any, device: torch.device) -> None:
        """Note a launch, and whether the host waits for the device."""
        line = _line()
        self.launches[name, line] += 1
        masks = words[1] if name in INDEXING else ()
        if name == "_local_scalar_dense" or name in WAITS:
            self.wait(name)
        elif name in ("_to_copy", "copy_") and device.type == "cpu":
            self.wait("to the CPU")
        elif name == "repeat_interleave" and len(words) < 3:
            self.wait(name)
        elif any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks):
            self.wait("boolean index")

    def wait(self, what: Any = None) -> None:
        """The host waits: for a value, or in torch.cuda.synchronize."""
        if self.recording:
            raise DeviceFaultError(f"the host waits while a graph is recorded: {_line()}")
        self.syncs[what if isinstance(what, str) else "synchronize", _line()] += 1


class Graph:
    """A CUDA graph: operations that are done again on the tensors they were recorded with."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.line = gpu, _line()
        self.steps: list[tuple[str, Any, Any, Any, Any]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, operation: Any, words: Any, options: Any) -> None:
        """Keep what an operation is going to overwrite."""
        for argument, value in zip(operation._schema.arguments, words, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, torch.Tensor):
                self.before.append((value, value.clone()))

    def undo(self) -> None:
        """Recording does nothing."""
        for value, old in reversed(self.before):
            value.copy_(old)
        self.before.clear()

    def replay(self) -> None:
        """Do it."""
        with torch.utils._python_dispatch._disable_current_modes():
            for name, operation, words, options, result in self.steps:
                self.gpu.launches[name, self.line] += 1
                done = operation(*words, **options)
                for old, new in zip(tree_flatten(result)[0], tree_flatten(done)[0], strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)

    def pool(self) -> None:
        """There is no memory of its own."""


_ACTIVE: list[PretendedGpu] = []


def environment(folder: Path) -> dict[str, str]:
    """Compile what a process needs beside this file; the variables to start it with.

    Args:
        folder: For the library.

    Raises:
        FileNotFoundError: There is no C++ compiler.
        subprocess.CalledProcessError: It does not compile; `stderr` says why.
    """
    home, library = Path(torch.__file__).parent, folder / "pretend_gpu.so"
    source = Path(__file__).with_suffix(".cpp")
    words = ["c++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source)]
    links = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
    subprocess.run([*words, "-o", str(library), *links], check=True, capture_output=True, text=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendedGpu]:
    """Let torch believe in a GPU."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.utils._device._device_constructors()  # remembers torch's own, before some are replaced
    gpu = PretendedGpu()
    states = (AcceleratorState, GradientState, PartialState)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _cuda(gpu).items():
            patch.setattr(torch.cuda, name, value)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _by_way_of_the_cpu(getattr(torch, name)))
        for name in ("range_push", "range_pop"):
            patch.setattr(torch.cuda.nvtx, name, _giving(None))
        patch.setattr(torch.version, "cuda", "12.8")
        data = property(_DATA.__get__, _take)
        patch.setattr(torch.nn.Parameter, "data", data, raising=False)
        patch.setattr(torch, "_has_compatible_shallow_copy_type", _same_kind)
        patch.setattr(torch.distributed, "init_process_group", _over_gloo)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode is of one thread
        for state in states:
            state._reset_state()
        _ACTIVE.append(gpu)
        try:
            with gpu:
                yield gpu
        finally:
            _ACTIVE.pop()
            for state in states:
                state._reset_state()


def _cuda(gpu: PretendedGpu) -> dict[str, Any]:
    """What torch.cuda says of one H100."""
    gib = 2**30
    facts = SimpleNamespace(
        name="Pretended H100", major=9, minor=0, total_memory=80 * gib, multi_processor_count=132
    )
    yes = ("is_available", "is_initialized", "is_bf16_supported")
    zero = (
        "current_device",
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    )
    nothing = (
        "_lazy_init",
        "init",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "set_device",
        "manual_seed",
        "manual_seed_all",
        "set_rng_state",
        "set_rng_state_all",
    )
    return {
        # each a function of its own: torch keeps a list of them in which none may be there twice
        **{name: _giving(True) for name in yes},
        **{name: _giving(0) for name in zero},
        **{name: _giving(None) for name in nothing},
        **{name: _giving(_Nothing()) for name in ("current_stream", "default_stream")},
        **{name: type(name, (_Nothing,), {}) for name in ("Stream", "Event", "stream", "device")},
        "device_count": lambda: 1,
        "is_current_stream_capturing": lambda: False,
        "_is_in_bad_fork": lambda: False,
        "synchronize": gpu.wait,
        "graph": gpu.record,
        "CUDAGraph": lambda: Graph(gpu),
        "get_device_name": lambda *_: facts.name,
        "get_device_properties": lambda *_: facts,
        "get_device_capability": lambda *_: (facts.major, facts.minor),
        "mem_get_info": lambda *_: (79 * gib, 80 * gib),
        "memory_stats": lambda *_: {},
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
    }


def _giving(value: Any) -> Any:
    """A function that gives always the same."""
    return lambda *_, **__: value


class _Nothing:
    """A stream or an event with nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a module's weight takes new numbers; a tensor of the CPU cannot become one of ours.

    So `module.to("cuda")` makes new parameters, and ties between weights that were on the CPU end.
    """
    return isinstance(one, OnGpu) == isinstance(other, OnGpu)


def _take(parameter: Any, value: torch.Tensor) -> None:
    """`parameter.data = value` where the parameter is of the CPU: it stays the same object."""
    if isinstance(value, OnGpu):
        made = torch.nn.Parameter(value, parameter.requires_grad)
        torch.utils.swap_tensors(parameter, made)
    else:
        _DATA.__set__(parameter, value)


_DATA: Any = torch._C.TensorBase.data


def _over_gloo(backend: str, *words: Any, **options: Any) -> None:
    """Processes meet over gloo: there is no NCCL."""
    _join("gloo", *words, **options)


_join = torch.distributed.init_process_group


def _by_way_of_the_cpu(make: Any) -> Any:
    """A function that makes tensors of Python's numbers, then moves them."""

    @functools.wraps(make)
    def made(*words: Any, device: Any = None, **options: Any) -> torch.Tensor:
        found = make(*words, **options)
        return found if device is None else found.to(device)

    return made


def _moved(index: Any) -> Any:
    """An index whose tensors, arrays and lists are tensors of the GPU."""
    if isinstance(index, tuple):
        return tuple(_moved(one) for one in index)
    if isinstance(index, np.ndarray | list):
        index = torch.as_tensor(index, dtype=None if len(index) else torch.long)
    return index.to(CUDA) if isinstance(index, torch.Tensor) and index.dim() else index


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def _on_cpu(value: Any) -> Any:
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _mixed_product(
    one: torch.Tensor, other: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The matrix product whose result has another type than its factors, which CUDA alone has."""
    if one.dtype != other.dtype or out_dtype not in (one.dtype, torch.float32):
        raise DeviceFaultError(f"mm of {one.dtype} and {other.dtype} to {out_dtype}: {_line()}")
    product = one.to(out_dtype) @ other.to(out_dtype)
    return product if out is None else out.copy_(product)


def _line() -> str:
    """The innermost line of denserl, as path:number."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/denserl_cli/" in file:
            return f"{file.rsplit('/denserl_cli/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
