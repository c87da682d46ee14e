"""Tiny models, a batch in verl's layout, and TrainingWorkers on a CPU."""

from functools import partial

import torch
import transformers
from tensordict import TensorDict
from verl import DataProto
from verl.utils import tensordict_utils as tu
from verl.utils.model import compute_position_id_with_mask
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig

from rlvr_ops.integrations.verl.reference import ppo_loss

EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)  # verl's own

VOCABULARY, PROMPT, RESPONSE = 90, 6, 8
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Models:
    """Folders of tiny random models, made when they are first asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, kind="qwen2", **config):
        folder = self.folder / "-".join([kind, *(f"{k}={v}" for k, v in config.items())])
        if not folder.exists():
            torch.manual_seed(0)
            made = transformers.AutoConfig.for_model(kind, **SHAPE | config)
            model = transformers.AutoModelForCausalLM.from_config(made).float()
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms too
            model.save_pretrained(folder)
        return str(folder)


def training_worker(path, *, remove_padding=False, micro_batch=2, dtype="float32", fsdp_size=-1, **model):
    """A TrainingWorker with SGD of learning rate 1 and no clipping: an update subtracts the gradient."""
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=path, load_tokenizer=False, use_remove_padding=remove_padding,
            override_config={"attn_implementation": "sdpa"}, **model,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", fsdp_size=fsdp_size, use_dynamic_bsz=False, micro_batch_size_per_gpu=micro_batch,
            infer_micro_batch_size_per_gpu=micro_batch, use_torch_compile=False, dtype="float32",
            mixed_precision={"param_dtype": short, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=1.0, optimizer="SGD", weight_decay=0.0, clip_grad=1e9, total_training_steps=10
        ),
        checkpoint_config=None,
    )  # fmt: skip
    worker = TrainingWorker(config)
    worker.reset()
    return worker


def actor(loss_mode="vanilla", numbers=None, **config):
    """verl's ActorConfig. `numbers` are those of its PolicyLossConfig."""
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, **(numbers or {})),
        **config,
    )


def batch(seed=0, ref=True, weights=False):
    """Four rollouts with paddings on both sides, as tensors (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (4, PROMPT + RESPONSE), generator=generator)
    attention = torch.ones_like(ids)
    for row, (left, right) in enumerate([(0, 0), (2, 3), (1, 5), (3, 0)]):
        attention[row, :left] = 0
        attention[row, PROMPT + RESPONSE - right :] = 0

    def near(level):
        return level + 0.3 * torch.randn(4, RESPONSE, generator=generator)

    advantages = torch.tensor([1.0, -0.7, -1.2, 0.4])[:, None].expand(4, RESPONSE)
    mask = attention[:, PROMPT:]
    return {
        "input_ids": ids, "attention_mask": attention, "position_ids": compute_position_id_with_mask(attention),
        "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "response_mask": mask, "advantages": advantages * mask,
        "old_log_probs": near(-4.4), **({"ref_log_prob": near(-4.6)} if ref else {}),
        **({"rollout_is_weights": near(1.0).clamp(0, 1.3)} if weights else {}),
    }  # fmt: skip


def nested(tensors, rows=slice(None), temperature=1.0, entropy=True) -> TensorDict:
    """The batch, or some of its rows, in the layout that TrainingWorker takes."""
    from verl.workers.utils.padding import left_right_2_no_padding

    rows = {name: tensor[rows].clone() for name, tensor in tensors.items()}
    tokens = rows["attention_mask"].sum(-1).tolist()
    meta = {"temperature": temperature, "global_token_num": tokens}
    data = left_right_2_no_padding(DataProto.from_single_dict(rows, meta_info=meta).to_tensordict())
    tu.assign_non_tensor(data, global_batch_size=len(tensors["input_ids"]), calculate_entropy=entropy)
    return data


def plain(tensors, counts=None):
    """The responses of a batch after prompts of one token, as verl's loss takes them, with its global counts."""
    rows, columns = tensors["response_mask"].shape
    names = ("response_mask", "old_log_probs", "ref_log_prob", "rollout_is_weights", "advantages")
    data = TensorDict(
        {name: tensors[name] for name in names if name in tensors}
        | {"prompts": torch.ones(rows, 1), "responses": torch.ones(rows, columns)}
        | {"attention_mask": torch.ones(rows, columns + 1, dtype=torch.long)},
        batch_size=[rows],
    )
    for name, value in ({"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None} | (counts or {})).items():
        data.set_non_tensor(name, value)
    return data


def train(worker, data, config, ace=None, loss=ppo_loss):
    """One optimiser step. Return its metrics as numbers, and the gradient of every parameter."""
    before = weights(worker)
    worker.set_loss_fn(partial(loss, config=config, **({} if ace is None else {"ace": ace})))
    metrics = tu.get(worker.train_batch(data), "metrics")
    after = weights(worker)
    return metrics, {name: before[name] - after[name] for name in before}


def weights(worker):
    """Every parameter, whole."""
    full = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in worker.engine.module.named_parameters()
    }
    return {name: p.detach().clone() for name, p in full.items()}


def score(worker, data):
    """The engine's log-probabilities and entropies, one tensor of all sequences' tokens each."""
    worker.set_loss_fn(None)
    tu.assign_non_tensor(data, compute_loss=False)
    out = worker.infer_batch(data)
    return out["log_probs"].values(), out["entropy"].values() if "entropy" in out else None


def plain_scores(path, tensors, temperature=1.0):
    """The model, and log-probabilities and entropies (B, T) of the responses, by transformers and its logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    given = {name: tensors[name] for name in ("input_ids", "attention_mask", "position_ids")}
    every = (model.eval()(**given).logits[:, PROMPT - 1 : -1] / temperature).log_softmax(-1)
    logps = every.gather(-1, tensors["responses"][..., None]).squeeze(-1)
    return model, logps, -(every.exp() * every).sum(-1)
