"""The receiving end of a transfer by files, for a vLLM without a GPU; it runs inside vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class FileTransferInit(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class FileTransferUpdate(WeightTransferUpdateInfo):
    """One bucket of weights. path: a safetensors file, names as in the checkpoint."""

    path: str


class FileWeightTransfer(WeightTransferEngine[FileTransferInit, FileTransferUpdate]):
    """Loads each bucket from a file of this machine, whose sender deletes it afterwards."""

    init_info_cls = FileTransferInit
    update_info_cls = FileTransferUpdate

    def init_transfer_engine(self, init_info: FileTransferInit) -> None:
        """Do nothing: files need no connection."""

    def start_weight_update(self) -> None:
        """Get ready for weights as a checkpoint has them; layers are rebuilt as they fill up."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileTransferUpdate) -> None:
        """Load one bucket."""
        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights([(name, file.get_tensor(name)) for name in file.keys()])

    def finish_weight_update(self) -> None:
        """Rebuild what the buckets have filled."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Do nothing: no file is open."""
