"""Sampling by vLLM in the trainer's own process: weights go over by reference, and nothing is written to a disk.

One process means one device: for tensor parallelism, or a device of the sampler's own, there are servers.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlvr_trainer.sampling.guest import as_a_guest
from rlvr_trainer.sampling.sampler import (
    Completion,
    FinishReason,
    SamplerError,
    Sampling,
    Weights,
    number,
    refuse_other_weights,
    shapes_of,
)

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


class VllmSampler:
    """An engine that starts with made-up weights and is given the policy's at once.

    Args:
        model: the policy's, of transformers.
        tokenizer: the policy's; the engine looks for stop texts with it.
        eos_ids: the end tokens.
        dtype: that the engine computes in.
        memory_share: of the device's memory, for weights and KV cache together; on a CPU for the KV cache alone.
        max_model_len: tokens of prompt and completion; None for all positions of the model.
        sleeps: whether to give its memory to the trainer between two calls, where the platform can.

    Raises:
        SamplerError: vLLM is not installed, or cannot run this model here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: list[int],
        *,
        dtype: torch.dtype,
        memory_share: float,
        max_model_len: int | None,
        sleeps: bool,
    ) -> None:
        self.dtype = dtype
        self.model, self.eos_ids, self.shapes = model, eos_ids, shapes_of(model.state_dict())
        with as_a_guest(), tempfile.TemporaryDirectory(prefix="rlvr-ops-") as folder:
            vllm = _import_vllm()
            from vllm.platforms import current_platform

            on_a_cpu = current_platform.is_cpu()
            self.sleeps = sleeps and current_platform.is_sleep_mode_available()
            write_model(Path(folder), model.config, tokenizer)
            try:
                self.engine: Any = vllm.LLM(
                    folder,
                    dtype=str(dtype).removeprefix("torch."),
                    load_format="dummy",
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    enforce_eager=on_a_cpu,
                    enable_chunked_prefill=not on_a_cpu,  # where it would lose a request's seed, and fail
                    **memory(memory_share, on_a_cpu),
                    max_model_len=max_model_len,
                    enable_sleep_mode=self.sleeps,
                    seed=0,
                )
            except Exception as error:
                raise SamplerError(f"vLLM cannot sample with this policy: {reason(error)}") from error
        self._lock, self._closed = threading.Lock(), False
        _call_first(self._refuse_if_closed, self.engine.llm_engine, "step")
        self.update(model.state_dict())

    def sample(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Sampler.sample`."""
        from vllm import SamplingParams

        greedy = sampling.temperature == 0  # all alike, and vLLM then takes no n
        parameters = [
            SamplingParams(
                n=1 if greedy else sampling.n,
                seed=sampling.seed + i * sampling.n,  # vLLM counts on from there for the other n - 1
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                stop=list(sampling.stop),
                stop_token_ids=self.eos_ids,
                skip_special_tokens=False,  # a stop text may be one
                detokenize=bool(sampling.stop),
                logprobs=0,
            )
            for i in range(len(prompts))
        ]
        with self._at_work("vLLM failed while sampling"):
            answers = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
            if self.sleeps:
                self.engine.sleep(level=1)  # weights to main memory, the cache is given up: the trainer's turn
        repeats = sampling.n if greedy else 1
        return [self._completion(output) for answer in answers for output in answer.outputs * repeats]

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        logps = [number(found[token].logprob) for found, token in zip(output.logprobs, ids, strict=True)]
        return Completion(ids, logps, finish_reason(output.finish_reason, output.stop_reason))

    def update(self, weights: Weights) -> None:
        """See `Sampler.update`. The prefix cache is emptied: it belongs to the old weights."""
        refuse_other_weights(weights, self.shapes)
        with self._at_work("vLLM could not take the weights"):
            pairs = iter(by_checkpoint_name(self.model, weights).items())
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            self.engine.reset_prefix_cache()

    @contextmanager
    def _at_work(self, failure: str) -> Iterator[None]:
        """Awake, and alone with the engine. It stays awake after an update, for what is sampled next."""
        with self._lock, as_a_guest():
            try:
                self._refuse_if_closed()
                if self.sleeps and self.engine.llm_engine.is_sleeping():
                    self.engine.wake_up()
                yield
            except SamplerError:
                raise
            except Exception as error:
                raise SamplerError(f"{failure}: {reason(error)}") from error

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise SamplerError("the sampler has been closed")

    def close(self) -> None:
        """See `Sampler.close`. What another thread is sampling ends at the next token."""
        already, self._closed = self._closed, True
        with self._lock:
            if not already:
                self.engine.llm_engine.engine_core.shutdown()


def memory(share: float, on_a_cpu: bool) -> dict[str, Any]:
    """How vLLM is told its share. On a CPU it would take the trainer's own memory for its weights."""
    if not on_a_cpu:
        return {"gpu_memory_utilization": share}
    import psutil

    return {"kv_cache_memory_bytes": int(share * psutil.virtual_memory().total)}


def by_checkpoint_name(model: Any, weights: Weights) -> dict[str, Tensor]:
    """A model's weights by the names that they have in a checkpoint, which is what vLLM reads."""
    given = {name: value.detach() for name, value in weights.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # a version that loads under the names of the file
        return given
    found: dict[str, Tensor] = revert_weight_conversion(model, given)
    return found


def finish_reason(reason: str | None, stopped_by: object) -> FinishReason:
    """vLLM's finish and stop reasons in our words: a stop *text* is a string there, an end token a number or nothing."""
    return "length" if reason == "length" else "stop" if isinstance(stopped_by, str) else "end"


def write_model(folder: Path, config: Any, tokenizer: Any) -> None:
    """All of a model but its weights, for an engine that is given those later."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _call_first(first: Callable[[], None], owner: Any, name: str) -> None:
    """Put a call of `first` before every call of a method."""
    own = getattr(owner, name)

    def both(*arguments: Any, **keywords: Any) -> Any:
        first()
        return own(*arguments, **keywords)

    setattr(owner, name, both)


def _import_vllm() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where weights go by reference
    try:
        import vllm
    except Exception as error:  # built for another torch, or another platform
        raise SamplerError(f"vLLM is installed and cannot be imported: {reason(error)}") from error
    return vllm
