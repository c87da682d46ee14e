"""A trainer small enough to be run many times: `tiny` without a warm start, on one thread, without a network."""

import os

os.environ["TQDM_DISABLE"] = "1"

import shutil
from dataclasses import dataclass, field

import pytest
from rlvr_trainer import loop
from rlvr_trainer.config import Config, load
from rlvr_trainer.judging.verdict import BAD_REFERENCE, RIGHT, WRONG, Verdict
from rlvr_trainer.policies import Policy, load_policy
from rlvr_trainer.tasks import Problem

SMALL = [
    "policy.name=tiny",
    "policy.precision=full",
    "policy.warm_start_steps=2",
    "policy.device=cpu",
    "task.parameters={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    "task.held_out=4",
    "task.verifier_processes=1",
    "rollout.prompts=3",
    "rollout.group_size=4",
    "rollout.max_new_tokens=5",
    "optim.learning_rate=1e-3",
    "optim.micro_batch=5",
    "evaluation.samples=2",
    "run.threads=1",
]


@pytest.fixture
def small(tmp_path):
    """Make a small configuration with overrides; it writes below tmp_path."""

    def make(*overrides: str) -> Config:
        return load(None, [*SMALL, f"run.out={tmp_path / 'run'}", *overrides])

    return make


@dataclass
class DigitTask:
    """Answers are right if they begin with a digit: about one in ten of a policy that knows nothing."""

    held_out: list[Problem] = field(default_factory=lambda: [Problem(f"held out {i}", "a digit") for i in range(4)])
    notices: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()  # prompts on which the verifier fails
    solved: tuple[str, ...] = ()  # prompts on which everything is right

    def problems(self, cursor, count):
        return [Problem(f"problem {i}", "a digit") for i in range(cursor, cursor + count)], cursor + count

    def restrict(self, fits):
        dropped = [problem for problem in self.held_out if not fits(problem)]
        self.held_out = [problem for problem in self.held_out if problem not in dropped]
        return dropped

    def score(self, problems, completions):
        found = []
        for problem, text in zip(problems, completions, strict=True):
            right = problem.prompt in self.solved or text[:1].isdigit()
            verdict = Verdict(float(right), RIGHT if right else WRONG)
            found.append(Verdict(None, BAD_REFERENCE) if problem.prompt in self.broken else verdict)
        return found

    def fingerprint(self):
        return "digits"

    def close(self):
        pass


@pytest.fixture
def digits():
    return DigitTask


def load_ready(config: Config) -> Policy:
    """A policy that can sample, for `DigitTask`."""
    policy = load_policy(config, DigitTask())
    policy.start_sampler(config)
    return policy


@pytest.fixture
def ready():
    return load_ready


@pytest.fixture(scope="session")
def untrained() -> Policy:
    """A `tiny` nobody has taught anything; not to be trained, it is shared."""
    return load_ready(load(None, [*SMALL, "policy.warm_start_steps=0"]))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of four steps with a checkpoint of each; not to be changed, it is shared."""
    run = tmp_path_factory.mktemp("finished") / "run"
    every = ["run.checkpoint_every=1", "run.keep_checkpoints=9", "run.steps=4", f"run.out={run}"]
    loop.train(load(None, [*SMALL, *every]), quiet=True)
    return run


@pytest.fixture
def four(finished, tmp_path):
    """A copy of that run, and its settings with further overrides."""
    run = shutil.copytree(finished, tmp_path / "copy")
    return run, lambda *overrides: load(run / "config.yaml", [f"run.out={run}", *overrides])
