"""What a stage costs in the CPUs' memory, in bytes over all processes; names as in memory_terms."""

from __future__ import annotations

from denserl_cli.core.planning.memory_terms import FLOAT, Setting


def reading(widest: int, setting: Setting) -> float:
    """Bytes of the CPUs' memory while models are read: one weight at a time in each process.

    Files are mapped: their pages belong to the system, which takes them back at need.
    """
    return setting.ranks * FLOAT * widest


def offloaded(trained: int, setting: Setting, *, widest: int = 0) -> float:
    """Bytes of the CPUs' memory, over all processes, that one model's offloading takes.

    The optimizer: 12T and 4T of float32 gradients. Beside them stage 1 and 2 have a buffer of wT,
    in each process one for the `widest` matrix, and wT of gradients that are added up in the
    compute type; stage 3 the accumulated gradients, gT. The parameters: wT.
    """
    size, w = 0.0, setting.compute
    if setting.offload_optimizer and setting.zero_stage == 3:
        size += (16 + setting.gradient) * trained
    elif setting.offload_optimizer:
        size += (16 + w * (1 if setting.sums_apart else 2)) * trained
        size += 0 if setting.on_cpu else setting.ranks * w * widest
    if setting.offload_parameters:
        size += w * trained
    return size
