"""ACE from hidden states to gradients, on a CPU. The README shows this file's body; a test runs it."""

import torch

from rlvr_ops import ace_loss, group_advantages, token_logps

hidden = torch.randn(8, 32, 64, requires_grad=True)  # (B, T, H): state t predicts completion_ids[:, t]
lm_head = torch.nn.Linear(64, 1000, bias=False)
completion_ids = torch.randint(1000, (8, 32))
rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])  # two prompts, four rollouts of each, verified right or wrong
advantages = group_advantages(rewards, group_size=4)
ref = token_logps(hidden.detach() + torch.randn(8, 32, 64), lm_head.weight.detach(), completion_ids).logps
out = ace_loss(hidden, lm_head.weight, completion_ids, advantages, ref_per_token_logps=ref)
out.loss.backward()
print(out.loss.item(), hidden.grad.norm().item(), out.metrics["ace/frac_overconfident"].item())
