"""The README's lines and the page's, as they stand there."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[3]


def block(page, marker):
    found = [
        text for text in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if marker in text
    ]
    assert len(found) == 1
    return found[0]


def test_the_readmes_lines_train(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = block("README.md", "ACEGRPOTrainer")
    assert len([line for line in lines.splitlines() if line]) <= 5
    settings = {
        "output_dir": "out", "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1,
        "max_completion_length": 6, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    names = {
        "model": folders(), "settings": settings, "reward_func": lambda completions, **_: [1.0, 0.0] * (len(completions) // 2),
        "dataset": Dataset.from_list([{"prompt": "1+1="}] * 8),
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(names["model"]).pad_token == "<pad>"
    exec(lines, names)
    assert "ace/weight/mean" in names["trainer"].state.log_history[0]


@pytest.mark.parametrize("module", ["trl", "trl.config", "trl.mixin", "trl.trainer"])
def test_the_examples_in_the_docstrings_run(module):
    module = importlib.import_module(f"rlvr_ops.integrations.{module}")
    assert doctest.testmod(module).failed == 0


def test_the_pages_subclass_is_one():
    names = {}
    exec(block("docs/trl.md", "class ACEGMPOTrainer"), names)
    assert names["ACEGMPOConfig"].__dataclass_fields__["ace_alpha"].default == 1.0
    assert names["ACEGMPOTrainer"].__mro__[1].__name__ == "ACEMixin"
