"""What vLLM loads from denserl, in vLLM's own processes: weights that come as files.

An entry point of the group `vllm.general_plugins` names `register`, so `vllm serve` in an
environment that has denserl (without its dependencies will do) accepts
`--weight-transfer-config '{"backend": "denserl-file"}'`.
"""

from __future__ import annotations

BACKEND = "denserl-file"
"""The name under which vLLM knows the transfer by files."""


def register() -> None:
    """Make the transfer by files known to vLLM; older releases, without transfer, are left alone.

    vLLM calls it once in each of its processes.
    """
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError:
        return
    WeightTransferEngineFactory.register_engine(
        BACKEND, "denserl_cli.core.sampling.vllm_file_transfer", "FileWeightTransfer"
    )
