"""Engines that sample completions, behind one interface: `Sampler`."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlvr_trainer.sampling.sampler import NO_VLLM, Completion, Sampler, SamplerError, Sampling

if TYPE_CHECKING:
    from rlvr_trainer.config import Config
    from rlvr_trainer.policies import Policy

__all__ = ["Completion", "Sampler", "SamplerError", "Sampling", "check_installed", "start_sampler"]


def check_installed(config: "Config") -> None:
    """Say that vLLM is missing before anything is loaded.

    Raises:
        SamplerError: it is, and `rollout.backend` is `vllm`.
    """
    if config.rollout.backend == "vllm" and find_spec("vllm") is None:
        raise SamplerError(NO_VLLM)


def start_sampler(policy: "Policy", config: "Config") -> Sampler:
    """The engine that `rollout.backend` names, with the policy's weights.

    Raises:
        SamplerError: it cannot be started or reached, or serves another model.
    """
    import torch

    rollout = config.rollout
    dtype = torch.bfloat16 if policy.mixed else torch.float32
    if rollout.backend == "transformers":
        from rlvr_trainer.sampling.generate import GenerateSampler

        copied = policy.mixed or rollout.asynchronous  # what is trained meanwhile must not change under the sampler
        return GenerateSampler(
            policy.model,
            policy.tokenizer,
            policy.eos_ids,
            dtype=dtype if copied else None,
            batch_size=rollout.batch_size,
            threads=rollout.threads,
        )
    if rollout.backend == "vllm":
        from rlvr_trainer.sampling.vllm_engine import VllmSampler

        if policy.device.index:
            raise SamplerError(
                f"rollout.backend=vllm samples on the first GPU, and policy.device is {policy.device}:"
                f" use CUDA_VISIBLE_DEVICES={policy.device.index} and policy.device=cuda, or vllm-server"
            )
        return VllmSampler(
            policy.model,
            policy.tokenizer,
            policy.eos_ids,
            dtype=dtype,
            memory_share=rollout.memory_share,
            max_model_len=rollout.max_prompt_tokens + rollout.max_new_tokens if rollout.max_prompt_tokens else None,
            sleeps=not rollout.asynchronous,
        )
    from rlvr_trainer.sampling.vllm_server import ServerSampler

    return ServerSampler(
        rollout.servers,
        policy.model,
        policy.tokenizer,
        policy.eos_ids,
        dtype=dtype,
        patience=rollout.server_timeout,
    )
