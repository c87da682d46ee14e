"""What the tests of the advantage estimators share."""

import torch

CENTRED = (
    "grpo", "dr_grpo", "rloo", "lite_ppo", "gpg", "opo", "oblr", "reinforce_plus_plus", "reinforce_plus_plus_baseline",
    "bnpo", "maxrl", "paired", "lens",
)  # fmt: skip


def extras(estimator, count):
    """What an estimator needs beyond rewards, for `count` rollouts in one pair of groups."""
    generator = torch.Generator().manual_seed(count)
    positive = 0.1 + 0.9 * torch.rand(count, dtype=torch.float64, generator=generator)
    return {
        "remax": {"reward_baselines": torch.randint(2, (count,), generator=generator)},
        "opo": {"lengths": torch.randint(1, 9, (count,), generator=generator)},
        "oblr": {"squared_gradient_norms": positive},
        "paired": {"pair_ids": torch.zeros(count, dtype=torch.long), "lambda_neg": 0.5},
        "lens": {"confidences": positive},
    }.get(estimator, {})


def permuted(inputs, order):
    return {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
