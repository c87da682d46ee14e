"""The README's five lines, the example and the page, as they stand."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_run
from hydra import compose, initialize_config_dir
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import validate_config

from rlvr_ops import Ace
from rlvr_ops.integrations.verl.losses import METHODS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "verl.md").read_text()
LINES = next(
    block
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    if "main_ppo" in block
)


def trainer(config):
    return get_trainer_cls(config.trainer.v1.trainer_mode)(config)


HEAD = "log-probabilities without logits, by our head"
PLACES = {  # loss_mode, further configuration, and what processes log once
    "loss": ("ace", (), ("in the loss ace", "loss_mode=ace: Clip(", HEAD)),
    "advantages": (
        "vanilla",
        tuple(
            f"actor_rollout_ref.actor.{setting}"
            for setting in ("ppo_mini_batch_size=2", "ppo_micro_batch_size_per_gpu=8", "ppo_epochs=2")
        ),
        ("in the advantages of the loss vanilla", HEAD),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_five_lines_of_the_readme_train_with_ace(place, tmp_path):
    """The lines as they stand, or with verl's loss, in a whole run of main_ppo: Ray, TransferQueue, two steps."""
    assert len(LINES.splitlines()) == 5
    loss_mode, overrides, lines = PLACES[place]
    script = LINES.replace("loss_mode=ace", f"loss_mode={loss_mode}")
    tiny_run.make(tmp_path)
    environment = os.environ | {
        "RUN": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform,cpu_rollout",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "COLUMNS": "9999",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VERL_ENGINE_VENDOR"):
        environment.pop(name, None)  # Ray's workers have their own
    arguments = ["--config-dir", str(Path(__file__).parent), "--config-name", "cpu_run", *overrides]
    done = subprocess.run(
        ["bash", "-euc", script, "bash", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=280, env=environment
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    assert "MISSING" not in output
    for said in lines:
        assert output.count(said) == 1, said
    first, second = (
        dict(re.findall(r"(\S+?):([-+\d.e]+)", line))
        for line in output.splitlines()
        if "step:1 " in line or "step:2 " in line
    )
    assert float(first["actor/ace/shift/mean"]) == pytest.approx(0, abs=1e-6)  # the policy is its reference still
    assert float(first["actor/ace/weight/mean"]) == pytest.approx(1 + math.log(2), abs=1e-5)
    assert float(second["actor/ace/shift/mean"]) != 0
    for step in (first, second):
        assert float(step["actor/grad_norm"]) > 0
        assert place == "advantages" or float(step["actor/pg_clipfrac"]) == 0


def test_the_readmes_numbers_go_beside_the_example_which_has_a_section_ace_already():
    words = re.search(r'ace="(.*?)"', LINES)[1].replace("alpha=1.0", "alpha=0.5").split()
    with initialize_config_dir(str(ROOT / "examples" / "verl"), version_base=None):
        assert compose("ace_grpo", overrides=words).ace.alpha == 0.5


def test_the_example_is_a_run_that_verl_and_the_trainer_accept():
    with initialize_config_dir(str(ROOT / "examples" / "verl"), version_base=None):
        config = compose("ace_grpo")
    config.ray_kwargs.ray_init.num_cpus = 1
    validate_config(config, need_reference_policy(config), need_critic(config))
    made = trainer(config)
    assert made.ace == Ace(1.0)
    assert made.ace_in_loss


@pytest.mark.parametrize("method", METHODS)
def test_the_page_names_every_loss(method):
    assert f"`{method.replace('_', '-')}`" in PAGE


def test_the_pages_own_loop_takes_a_step(models):
    block = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S) if "set_loss_fn" in block)
    worker, actor_config = tiny.training_worker(models()), tiny.actor("ace")
    exec(block, {"worker": worker, "actor_config": actor_config})
    found = tiny.tu.get(worker.train_batch(tiny.nested(tiny.batch())), "metrics")["loss"]
    wanted, _ = tiny.train(tiny.training_worker(models()), tiny.nested(tiny.batch()), actor_config, Ace(1.0))
    assert found == pytest.approx(wanted["loss"], abs=1e-6)
