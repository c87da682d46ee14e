"""The README's five lines, the example and the page, as they stand."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
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


def test_the_five_lines_of_the_readme_run_and_configure_ace(tmp_path):
    assert len(LINES.splitlines()) == 5
    arguments = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "--cfg", "job"]  # print the configuration
    done = subprocess.run(
        ["bash", "-euc", LINES, "bash", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=os.environ | {"PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check, configuration = done.stdout.split("actor_rollout_ref:", 1)
    assert check.count("ok ") == 6
    config = OmegaConf.create(yaml.safe_load("actor_rollout_ref:" + configuration))
    made = trainer(config)
    assert (made.ace, made.ace_in_loss, made.use_reference_policy) == (Ace(1.0), True, True)


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
