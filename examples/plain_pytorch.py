"""ACE-DAPO in a plain loop. Prompts are two digits; those of a right answer are at least as large as both; 0 ends it."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlvr_ops import Head, ace_loss, group_advantages, hidden_states_of, token_logps

STEPS, PROMPTS, GROUP, MICRO_BATCH, ALPHA = 30, 8, 8, 16, 1.0
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@torch.no_grad()
def logps(policy, ids, length):
    """Log-probabilities of the last `length` tokens."""
    return token_logps(hidden_states_of(policy, ids, length=length), Head.from_model(policy), ids[:, -length:]).logps


torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=10, pad_token_id=0, eos_token_id=0, **SIZES)).eval()
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(STEPS):
    prompts = torch.randint(1, 10, (PROMPTS, 2)).repeat_interleave(GROUP, 0)
    ids = model.generate(prompts, attention_mask=prompts > 0, do_sample=True, top_k=0, max_new_tokens=2)
    answers, T, outs = ids[:, 2:], ids.shape[1] - 2, []
    rewards = (answers >= prompts.amax(1, keepdim=True)).all(1).float()
    mask = (answers == 0).cumsum(1).cumsum(1) <= 1  # through the first 0
    batch = ids, mask, group_advantages(rewards, GROUP), logps(model, ids, T), logps(reference, ids, T)
    settings = {"loss_type": "dapo", "epsilon_high": 0.28, "alpha": ALPHA, "num_items_in_batch": mask.sum()}
    for ids, mask, advantages, old, ref in zip(*(tensor.split(MICRO_BATCH) for tensor in batch), strict=True):
        given = {"completion_mask": mask, "old_per_token_logps": old, "ref_per_token_logps": ref, **settings}
        hidden = hidden_states_of(model, ids, length=T)
        outs.append(ace_loss(hidden, Head.from_model(model), ids[:, -T:], advantages, **given))
        outs[-1].loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss, weight = sum(out.loss for out in outs), max(out.metrics["ace/weight/max"] for out in outs)
    print(f"step {step} loss {loss:.3f} reward {rewards.mean():.2f} largest weight {weight:.2f}")
