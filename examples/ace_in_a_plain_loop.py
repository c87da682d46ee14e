"""ACE-GRPO in a loop of your own: a transformers model, its `generate`, and three functions of rlvr_ops.

The policy is a small random Llama over 32 tokens, and an answer is right if its first token is below 8: one in four at
first, nearly all after half a minute on a CPU. Everything a real run adds is in `trainer/rlvr_trainer/loop.py`.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlvr_ops import ace_loss, group_advantages, token_logps

PROMPTS, GROUP, LENGTH, STEPS = 4, 8, 3, 30

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=None,
    )
).eval()  # dropout would make the ratios noise
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)


def hidden_states(network, ids):
    """Row t predicts completion token t: shifted by one, and only the completion's rows."""
    return network.model(input_ids=ids).last_hidden_state[:, -LENGTH - 1 : -1]


mean_rewards = []
for _ in range(STEPS):
    prompts = torch.randint(1, 32, (PROMPTS, 5)).repeat_interleave(GROUP, 0)
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=LENGTH
    )
    completion_ids = ids[:, -LENGTH:]
    rewards = (completion_ids[:, 0] < 8).float()
    with torch.no_grad():
        ref = token_logps(hidden_states(reference, ids), reference.lm_head.weight, completion_ids).logps
    out = ace_loss(
        hidden_states(model, ids),
        model.lm_head.weight,
        completion_ids,
        group_advantages(rewards, GROUP),
        ref_per_token_logps=ref,
        beta=0.001,
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    mean_rewards.append(rewards.mean().item())

print(
    f"mean reward: {sum(mean_rewards[:5]) / 5:.2f} in the first five steps, {sum(mean_rewards[-5:]) / 5:.2f} in the last"
)
