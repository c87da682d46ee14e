"""Policies small enough for an engine to start in seconds: untied and tied heads, and two that vLLM does not get right."""

import torch
from rlvr_trainer import tiny
from rlvr_trainer.config import load
from rlvr_trainer.policies import load_policy

MODELS = ("llama", "tied qwen2")


def make_policy(kind, folder):
    """A policy loaded from `folder`, with weights large enough that its tokens differ."""
    import transformers

    architecture = {"tied qwen2": "Qwen2", "qwen3 moe": "Qwen3Moe"}.get(kind, "Llama")
    tokenizer = tiny.make_tokenizer()
    heads = 4 if kind == "head_dim 24" else 3
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kind == "head_dim 24" else 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": kind == "tied qwen2",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "qwen3 moe":
        shape |= {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**shape)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_policy(load(None, [f"policy.name={folder}", "policy.precision=full", "policy.device=cpu"]), None)


@torch.no_grad()
def nudge(model):
    """An update: other weights, of all names."""
    generator = torch.Generator().manual_seed(int(1e6 * float(next(model.parameters()).abs().sum())) % 2**31)
    for parameter in model.parameters():
        parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def scores(policy, prompt, completion, temperature):
    """(T,), log-probabilities of a completion by the model's own forward."""
    logits = policy.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(completion)), completion]
