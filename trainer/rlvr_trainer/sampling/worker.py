"""What the trainer asks of a vLLM server's workers: `rlvr-ops serve` names it as `--worker-extension-cls`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rlvr_trainer.sampling import transfer


class Extension:
    """Methods that vLLM adds to its worker. They take and give what JSON can say."""

    rlvr_version = ""  # of the weights, in the words of whoever sent them

    def rlvr_describe(self) -> dict[str, Any]:
        """The served model, and of which distribution its log-probabilities are."""
        model: Any = self.vllm_config.model_config  # type: ignore[attr-defined]
        dtype = str(model.dtype).removeprefix("torch.")
        return {"config": plain(model.hf_config), "dtype": dtype, "logprobs_mode": model.logprobs_mode}

    def rlvr_sees(self, path: str, content: str) -> dict[str, bool]:
        """Whether this machine has a file with this content: then it is the trainer's."""
        file = Path(path)
        return {"seen": file.is_file() and file.read_text() == content}

    def rlvr_weights(self) -> dict[str, str]:
        """Which weights these are; nothing for those that the server started with."""
        return {"version": self.rlvr_version}

    def rlvr_load(self, path: str, version: str) -> None:
        """Take weights from a safetensors file, by the names of a checkpoint."""
        from safetensors.torch import load_file

        self._rlvr_take(iter(load_file(path).items()), version)

    def rlvr_receive(
        self, address: str, port: int, size: int, layout: transfer.Layout, patience: float, version: str
    ) -> None:
        """Take weights from the trainer at `address`, which sends them to all of a group of `size`."""
        self._rlvr_take(transfer.receive(address, port, size, layout, patience), version)

    def _rlvr_take(self, pairs: Iterator[tuple[str, Tensor]], version: str) -> None:
        self.rlvr_version = "half of new weights"  # should this fail, nothing that is sampled counts
        self.reload_weights(weights_iterator=pairs)  # type: ignore[attr-defined]
        self.rlvr_version = version


def plain(config: Any) -> dict[str, Any]:
    """A model's configuration of transformers as JSON has it."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found
