"""Every loss of the library on one made-up batch: its value, its gradient, what it clipped, how the head ran it.

The policy that sampled is a little behind the one in training, so that ratios are not 1. The workspace holds ten rows of
logits and a rollout has up to sixteen tokens: a loss that needs no other token goes through the vocabulary once, in chunks
that end anywhere, and one that needs whole rollouts goes twice. With room for the longest rollout all would go once.
"""

import torch

from rlvr_ops import ace_loss, group_advantages, token_logps

B, T, H, V, GROUP = 8, 16, 32, 500, 4


def quadratic(per_token_logps, rows):
    """A loss of one's own: no clip, but a parabola in the ratio, least at 1.2 for right tokens and at 0.8 for wrong ones."""
    ratio = (per_token_logps - rows.old_per_token_logps).exp()
    penalty = rows.advantages.abs() * (ratio - 1) ** 2 / 0.4
    return penalty - rows.advantages * ratio


SEQUENCE = {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}
LOSSES = {
    "grpo": {},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dual clip": {"delta": 3.0},
    "gspo": SEQUENCE,
    "gspo, token form": {**SEQUENCE, "importance_sampling_level": "sequence_token"},
    "luspo": {**SEQUENCE, "loss_type": "luspo"},
    "cispo": {"surrogate": "cispo", "loss_type": "dapo"},
    "cispo_two_sided": {"surrogate": "cispo_two_sided", "loss_type": "dapo"},
    "dispo": {"surrogate": "dispo", "loss_type": "dapo"},
    "dppo": {"surrogate": "dppo"},
    "ipo": {"surrogate": "ipo"},
    "sapo": {"surrogate": "sapo"},
    "gmpo": {"surrogate": "gmpo"},
    "vespo": {"surrogate": "vespo", "loss_type": "dapo"},
    "reinforce": {"surrogate": "reinforce"},
    "dro": {"surrogate": "reinforce", "beta": 0.1, "kl_estimator": "k2", "kl_against": "old"},
    "clip_cov": {"surrogate": "clip_cov"},
    "kl_cov": {"surrogate": "kl_cov"},
    "fipo": {"surrogate": "fipo", "loss_type": "dapo"},
    "quadratic, one's own": {"surrogate": quadratic},
}

torch.manual_seed(0)
hidden = torch.randn(B, T, H)
weight = torch.randn(V, H) / H**0.5
completion_ids = torch.randint(V, (B, T))
completion_mask = torch.arange(T) < torch.tensor([[16], [9], [12], [5], [16], [7], [11], [14]])
rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])  # two prompts, four rollouts of each
advantages = group_advantages(rewards, GROUP)
old, ref = (
    token_logps(hidden + distance * torch.randn(B, T, H), weight, completion_ids).logps for distance in (0.1, 0.2)
)


def measure(settings, alpha):
    """(loss, gradient norm by the hidden states, share of tokens clipped, passes over the vocabulary)."""
    leaf = hidden.clone().requires_grad_()
    out = ace_loss(
        leaf,
        weight,
        completion_ids,
        advantages,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        completion_mask=completion_mask,
        alpha=alpha,  # ACE: 0 is off, 1 is the paper's
        workspace_bytes=10 * V * hidden.element_size(),
        **settings,
    )
    out.loss.backward()
    clipped = out.metrics["clip_ratio/region_mean"].item()
    return out.loss.item(), leaf.grad.norm().item(), clipped, 1 if out.metrics["head/single_pass"] else 2


table = {(name, alpha): measure(settings, alpha) for name, settings in LOSSES.items() for alpha in (0.0, 1.0)}

if __name__ == "__main__":
    print(f"{'':22}{'':5}{'loss':>10}{'|d hidden|':>12}{'clipped':>9}{'passes':>8}")
    for (name, alpha), (loss, norm, clipped, passes) in table.items():
        label, ace = ("", "ACE") if alpha else (name, "")
        print(f"{label:22}{ace:5}{loss:10.5f}{norm:12.5f}{clipped:9.0%}{passes:8d}")
    print(
        "\nLosses with log-probabilities in them (cispo, dispo, dppo, ipo, vespo, reinforce, dro) cannot be compared with others;"
        "\ngradients can. Equal on this batch: grpo and dual clip, cispo and dispo, dppo and ipo (no ratio is beyond their bounds);"
        "\ngspo's two forms (one advantage per rollout). passes: over the vocabulary, with a workspace of ten rows."
    )
