"""An engine computes what the policy computes, or is refused: one that loads weights into the wrong places still talks."""

from typing import TYPE_CHECKING

import torch

from rlvr_trainer.sampling.sampler import Sampler, SamplerError, Sampling

if TYPE_CHECKING:
    from rlvr_trainer.config import RolloutConfig
    from rlvr_trainer.policies import Policy

TOKENS = 16  # of the prompt, and of what is sampled; fewer where the engine was made for fewer
LIMITS = {torch.float32: 0.01, torch.bfloat16: 0.5}
"""Nats on average. Rounding alone makes 1e-5 and 0.05 of them."""


@torch.no_grad()
def refuse_disagreement(sampler: Sampler, policy: "Policy", rollout: "RolloutConfig") -> None:
    """Compare the log-probabilities of a few sampled tokens with the policy's own.

    Raises:
        SamplerError: they are further apart than the type that the engine computes in explains.
    """
    rows = policy.model.get_input_embeddings().weight.shape[0]
    width = min(TOKENS, rollout.max_prompt_tokens or TOKENS)
    prompt = [policy.eos_ids[0], *range(0, rows, max(rows // TOKENS, 1))][:width]
    (found,) = sampler.sample([prompt], Sampling(min(TOKENS, rollout.max_new_tokens)))
    ids = torch.tensor([[*prompt, *found.token_ids]], device=policy.device)
    logps = policy.model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = logps.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
    apart = float((own - torch.tensor(found.logps)).abs().nanmean())
    limit = LIMITS.get(sampler.dtype, LIMITS[torch.bfloat16])
    if not apart <= limit:  # NaN too: an engine that gives no log-probabilities cannot be corrected for
        raise SamplerError(
            f"the engine disagrees with the policy: log-probabilities of the same tokens are {apart:.2g} nats apart on average,"
            f" and rounding explains at most {limit}. It has this {type(policy.model).__name__}'s weights in the wrong places"
        )
