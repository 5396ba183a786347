"""A process of `test_vllm_client.py`: one of several that sample from one server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from denserl_cli.core.errors import ServiceError
from denserl_cli.core.recipe.schema import RolloutConfig
from denserl_cli.core.sampling.base import Sampling
from denserl_cli.core.sampling.sampler import Sampler
from denserl_cli.core.sampling.vllm_engine import VllmSampling
from denserl_cli.core.system import distributed
from tests import tiny


class NoProbe(VllmSampling):
    """For a server without a model."""

    def _probe(self) -> None:
        pass


def main(address: str, out: str) -> None:
    """Sample, then sample where the server refuses the prompts that are longer than 3."""
    distributed.join()
    policy = tiny.frozen(tiny.causal_lm())
    settings = RolloutConfig(engine="vllm", server=address)
    sampler = Sampler(NoProbe(policy, settings, pad_id=0, max_length=40))
    sampler.refresh()
    prompts = [np.arange(1, 3 + row % 2, dtype=np.int32) for row in range(5)]
    keys = [(0, row) for row in range(5)]
    drawn = sampler.sample(prompts, keys, Sampling(8, (5,)))
    found = {"drawn": [one.ids.tolist() for one in drawn]}
    prompts[0] = np.arange(9, dtype=np.int32)  # of one process alone
    try:
        sampler.sample(prompts, keys, Sampling(8, (5,)))
    except ServiceError as error:
        found["failed"] = error.message
    sampler.close()
    Path(f"{out}-{distributed.rank()}").write_text(json.dumps(found))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
