"""The pages about the trainer, held against what it does."""

import re
from pathlib import Path

from rlvr_trainer import loop
from rlvr_trainer.config import PRESETS, shipped
from rlvr_trainer.console import read_jsonl

ROOT = Path(__file__).parents[2]


def test_every_logged_metric_is_explained_and_every_explained_one_is_logged(small, digits, monkeypatch, tmp_path):
    task = digits(solved=("held out 0",))  # some answers are right, most are wrong, so that AUROC is defined
    monkeypatch.setattr(loop, "make_task", lambda *_: task)
    overrides = ["run.steps=2", "policy.precision=mixed", "policy.warm_start_steps=0", "rollout.group_size=16"]
    loop.train(small(*overrides), quiet=True)
    logged = {name for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") for name in row} - {"step"}
    logged = {re.sub(r"pass@\d+", "pass@k", name).replace("best_of@2", "best_of@n") for name in logged}
    tables = [line.split("|")[1] for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if "|" in line]
    explained = {name for cell in tables for name in re.findall(r"`([^`]+)`", cell)}
    assert explained == logged


def test_the_trainer_page_names_every_preset_and_every_shipped_configuration():
    page = (ROOT / "docs" / "trainer.md").read_text()
    assert all(f"`{name}`" in page for name in [*PRESETS, *shipped()])
