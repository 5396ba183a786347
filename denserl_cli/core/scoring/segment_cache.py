"""Segments of training responses on disk: the reference reads each response once for all runs.

A response's segments are those of the batch in which it was first read. The file's name is a hash
of everything that this batch and its numbers depend on, so a run's results are the same bytes with
and without the cache.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.data import cache, fingerprint
from denserl_cli.core.data.arrow_rows import PairRows, sequences_of
from denserl_cli.core.system.distributed import (
    any_rank,
    broadcast_object,
    is_main_process,
    world_size,
)
from denserl_cli.core.system.environment import device_name, versions

if TYPE_CHECKING:
    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.scoring.scorer import Scorer

_CHECKSUM = 4
"""Bytes of the checksum that follows the bits of a response."""


class SegmentCache:
    """Segments of numbered sequences: read from the file, or else computed and written to it.

    A record is one bit for each response token and a checksum, at an offset that follows from the
    lengths. A record that was never written, or only in part by a killed job, is computed again.
    """

    def __init__(
        self,
        scorer: Scorer,
        lengths: np.ndarray,
        file: Path,
        observer: Observer,
    ) -> None:
        """Open the file, or create it.

        Args:
            scorer: Computes segments that are not in the file.
            lengths: (N,), tokens of each response.
            file: Of the cache.
            observer: Told when the file cannot be used.
        """
        self.scorer, self.lengths, self.observer = scorer, lengths, observer
        self.starts = np.concatenate([[0], ((lengths + 7) // 8 + _CHECKSUM).cumsum()])
        self.file: FileIO | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.file = FileIO(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        except OSError as error:
            self._give_up(error)

    def __call__(self, batch: SequenceBatch, numbers: np.ndarray) -> Tensor:
        """The segment ends of a batch.

        Where one process needs the reference all call it: it may be sharded.

        Args:
            batch: Of R sequences.
            numbers: (R,), the numbers of the sequences.

        Returns:
            (R, T) bool.
        """
        device = batch.response_mask.device
        kept = [self._read(int(number)) for number in numbers]
        missing = [row for row, ends in enumerate(kept) if ends is None]
        known = torch.zeros(batch.response_mask.shape, dtype=torch.bool)
        for row, one in enumerate(kept):
            if one is not None:
                known[row, : len(one)] = torch.from_numpy(one)
        if not any_rank(bool(missing)):
            return known.to(device)
        found = self.scorer(batch).ends
        if missing:
            known[missing] = found[missing].cpu()
            for row in missing:
                self._write(int(numbers[row]), known[row].numpy())
        return known.to(device)

    def _read(self, number: int) -> np.ndarray | None:
        if self.file is None:
            return None
        start, stop = self.starts[number : number + 2].tolist()
        try:
            record = os.pread(self.file.fileno(), stop - start, start)
        except OSError as error:
            self._give_up(error)
            return None
        bits, checksum = record[:-_CHECKSUM], record[-_CHECKSUM:]
        if len(record) < stop - start or checksum != _checksum(bits):
            return None
        ends = np.unpackbits(np.frombuffer(bits, np.uint8), count=int(self.lengths[number]))
        return ends.astype(bool)

    def _write(self, number: int, ends: np.ndarray) -> None:
        if self.file is None:
            return
        bits = np.packbits(ends[: self.lengths[number]]).tobytes()
        try:
            os.pwrite(self.file.fileno(), bits + _checksum(bits), int(self.starts[number]))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.file = None
        self.observer.notice(
            f"segments are not kept in {cache.folder()} ({error.strerror or error}): the reference "
            f"reads every response again; another folder can be named in {cache.VARIABLE}"
        )


def _checksum(bits: bytes) -> bytes:
    return zlib.crc32(bits).to_bytes(_CHECKSUM, "little")


def open_cache(
    rows: PairRows, recipe: Recipe, scorer: Scorer, observer: Observer
) -> SegmentCache | None:
    """The cache for the pairs that a recipe's reward model is trained on.

    The first process decides for all, because all must make the same collective calls.

    Args:
        rows: The pairs.
        recipe: Whose reward model is trained.
        scorer: Computes segments that are not in the cache.
        observer: Told when the cache cannot be used.

    Returns:
        The cache; None where the reference's weights cannot be identified.
    """
    key = broadcast_object(_key(rows, recipe) if is_main_process() else None)
    if key is None:
        return None
    responses = sequences_of(rows).responses
    return SegmentCache(scorer, responses, cache.folder() / "segments" / key, observer)


def _key(rows: PairRows, recipe: Recipe) -> str | None:
    training = recipe.reward_model
    reference = fingerprint.of_model(recipe.model.path, recipe.model.revision)
    if reference is None:
        return None
    follows_from = {
        "rows": rows.identity(),
        "reference": reference,
        "model": [recipe.model.dtype, recipe.model.attention, recipe.model.packing],
        "lora": None if recipe.lora is None else asdict(recipe.lora),
        "segmentation": recipe.segmentation.deciding(),
        "batches": [recipe.seed, training.batch_size, training.micro_batch_size],
        "engine": asdict(training.engine),
        **_of_segmenting(),
    }
    return fingerprint.of_settings(follows_from)


def _of_segmenting() -> dict[str, Any]:
    """What a segment depends on beside models and settings: code, versions and hardware."""
    import torch

    return {
        "code": fingerprint.of_code("reward_model.trainer"),
        "versions": versions(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }
