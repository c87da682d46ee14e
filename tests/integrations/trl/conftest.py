"""Tiny models in folders and trainers on them: everything that TRL loads by name, made on the spot."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlvr_ops.integrations.trl import ACEGRPOConfig, ACEGRPOTrainer

SPECIAL = ("<pad>", "<eos>", "<unk>")
VOCABULARY = {chr(code): code - 32 for code in range(32, 127)} | {name: 95 + i for i, name in enumerate(SPECIAL)}
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 95,
    "eos_token_id": 96,
    "bos_token_id": None,
}
FAMILIES = {
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "untied": ("Qwen2", {}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "scale": ("Cohere", {"logit_scale": 0.25}),
    "experts": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "output_router_logits": True},
    ),
}


@pytest.fixture(autouse=True)
def repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_tokenizer():
    """One token for each character."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A function from a family to the folder of its tiny model."""
    made = {}

    def folder(family="untied"):
        if family not in made:
            name, sizes = FAMILIES[family]
            config = getattr(transformers, f"{name}Config")(**SIZES | sizes)
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            make_tokenizer().save_pretrained(made[family])
        return str(made[family])

    return folder


def reward(completions, **_):
    """Right if the first character is below '@': about a third at first."""
    return [float(completion[:1] < "@") for completion in completions]


@pytest.fixture
def make_trainer(folders, tmp_path):
    """A function that makes a trainer; keywords are settings."""

    def make(kind=ACEGRPOTrainer, config=ACEGRPOConfig, model=None, family="untied", trainer=None, **settings):
        settings = {
            "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 2,
            "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no",
            "learning_rate": 1e-2, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 3,
        } | settings  # fmt: skip
        rows = [{"prompt": prompt} for prompt in ("1+1=", "2+30=", "say:", "x")] * 8
        return kind(
            folders(family) if model is None else model, reward, config(str(tmp_path), **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(), **(trainer or {}),
        )  # fmt: skip

    return make


def a_batch(trainer, **more):
    """What `_compute_loss` gets: prompts padded on the left, completions on the right, one of them not counted at all."""
    generator = torch.Generator().manual_seed(5)
    shape = (4, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 5 + [0], [1, 1, 0, 0, 0, 0]])
    completion = torch.randint(3, 90, shape, generator=generator).masked_fill(mask == 0, 95)
    prompt_mask = torch.tensor([[0, 1, 1, 1], [1] * 4, [0, 0, 1, 1], [1] * 4])
    prompts = torch.randint(3, 90, (4, 4), generator=generator).masked_fill(prompt_mask == 0, 95)
    batch = {
        "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": completion, "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.7, -1.3, 0.4]), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    with torch.no_grad():
        ids, attention = torch.cat([prompts, completion], 1), torch.cat([prompt_mask, mask], 1)
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 6)[0]
    noise = [0.3 * torch.randn(shape, generator=generator) for _ in range(2)]
    return batch | {"ref_per_token_logps": logps + noise[0], "old_per_token_logps": logps + noise[1]} | more


def loss_and_gradients(trainer, batch, method=None, mode="train"):
    """The loss of a batch and the gradient of every parameter, by name."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train(mode == "train")
    trainer.model.zero_grad()
    loss = (method or trainer._compute_loss)(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {name: x.grad.clone() for name, x in named if x.grad is not None}


@pytest.fixture
def tools():
    """The two functions above, for tests: helpers are not importable from a conftest."""
    return a_batch, loss_and_gradients
