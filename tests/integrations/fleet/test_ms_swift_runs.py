"""ms-swift's own command trains a tiny policy on a CPU, with a plug-in file as docs/frameworks.md shows it."""

import json
import os
import string
import subprocess
import sys

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

STEPS = 6
REWARD = """
from swift.rewards import ORM, orms
class Lowercase(ORM):
    def __call__(self, completions, **others):
        return [sum(letter.islower() for letter in text) / max(len(text), 1) for text in completions]
orms["lowercase"] = Lowercase
"""
ACE = "from rlvr_ops.integrations.ms_swift import register\nregister({})\n"
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2 of 27,000 random weights that reads letters, and eight prompts."""
    folder = tmp_path_factory.mktemp("swift")
    vocabulary = {token: i for i, token in enumerate([*string.printable[:95], "\n", *MARKS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token=MARKS[2], pad_token=MARKS[0], unk_token=MARKS[3],
        additional_special_tokens=[MARKS[1]], chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    config = Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=vocabulary[MARKS[2]], pad_token_id=vocabulary[MARKS[0]],
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    rows = [json.dumps({"messages": [{"role": "user", "content": f"say {i}"}]}) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


def train(folder, name, settings, *options):
    """Run `swift rlhf`; return its log, one dictionary for each step, or what it said as it failed."""
    (folder / f"{name}.py").write_text((ACE.format(settings) if settings is not None else "") + REWARD)
    command = [
        sys.executable, "-m", "swift.cli.rlhf", "--rlhf_type", "grpo", "--external_plugins", folder / f"{name}.py",
        "--model", folder / "model", "--model_type", "qwen2", "--template", "dummy", "--tuner_type", "full",
        "--torch_dtype", "float32", "--use_cpu", "true", "--dataset", folder / "rows.jsonl", "--check_model", "false",
        "--reward_funcs", "lowercase", "--num_generations", "4", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "2", "--num_iterations", "2", "--max_completion_length", "8", "--max_steps",
        STEPS, "--beta", "1e-8", "--learning_rate", "1e-2", "--seed", "1", "--logging_steps", "1", "--report_to",
        "none", "--save_strategy", "no", "--eval_strategy", "no", "--add_version", "false", "--output_dir",
        folder / name, *options,
    ]  # fmt: skip
    environment = os.environ | {
        "USE_HF": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        return done.stderr
    return [json.loads(line) for line in (folder / name / "logging.jsonl").read_text().splitlines()][:STEPS]


@pytest.fixture(scope="module")
def stock(folder):
    return train(folder, "stock", None)


def columns(log, *names):
    return [[row[name] for row in log] for name in names]


def test_alpha_0_trains_as_ms_swift_does(folder, stock):
    found = train(folder, "zero", "alpha=0.0")
    names = "loss", "grad_norm", "reward", "kl"
    shown = [name for name in names if all(name in row for row in stock)]
    assert {"loss", "grad_norm"} <= set(shown)
    assert columns(found, *shown) == columns(stock, *shown)
    assert not any(name.startswith("ace/") for row in found for name in row)


def test_our_clip_without_ace_trains_as_ms_swifts(folder, stock):
    found = train(folder, "ours", 'alpha=0.0, surrogate="ppo_clip"')
    assert columns(found, "loss", "grad_norm")[0] == pytest.approx(columns(stock, "loss")[0], abs=1e-5)
    assert columns(found, "grad_norm")[0] == pytest.approx(columns(stock, "grad_norm")[0], rel=1e-4)


def test_ace_is_in_the_log_and_trains_otherwise(folder, stock):
    found = train(folder, "ace", "alpha=1.0")
    assert found[0]["ace/weight/mean"] == pytest.approx(1.6931, abs=1e-3)  # the reference is the policy still
    assert found[-1]["ace/shift/mean"] != 0
    assert columns(found, "grad_norm") != columns(stock, "grad_norm")


def test_without_beta_the_run_ends_with_the_setting_that_is_missing(folder):
    assert "--beta is 0, so no reference is scored: give --beta above 0" in train(
        folder, "refused", "alpha=1.0", "--beta", "0"
    )
