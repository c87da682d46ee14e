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
        """The served model, of which distribution its log-probabilities are, and how many engines there are."""
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        model, dtype = config.model_config, str(config.model_config.dtype).removeprefix("torch.")
        return {
            "config": plain(model.hf_config),
            "dtype": dtype,
            "logprobs_mode": model.logprobs_mode,
            "engines": _engines(config.parallel_config),
        }

    def rlvr_sees(self, path: str, content: str) -> dict[str, bool]:
        """Whether this machine has a file with this content: then it is the trainer's."""
        try:
            return {"seen": Path(path).read_text() == content}
        except OSError:  # there is none, or it is another user's
            return {"seen": False}

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


def _engines(parallel: Any) -> int:
    """How many engines share the requests. Those of a dense model believe that they are alone, but for one setting."""
    return max(parallel.data_parallel_size, getattr(parallel, "elastic_ep_max_dp_size", None) or 1)


def plain(config: Any) -> dict[str, Any]:
    """A model's configuration of transformers as JSON has it."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found
