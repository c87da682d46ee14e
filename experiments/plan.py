"""What is run: tasks, arms and seeds of `python -m experiments.ace`. docs/reproduction.md says why."""

from dataclasses import dataclass, field
from functools import cached_property

from rlvr_trainer.config import Config, load

TINY = [
    "policy.warm_start_steps=600",
    "policy.warm_start_noise=0.5",
    "algorithm.beta=0",
    "optim.learning_rate=2.5e-4",
    "task.held_out=128",
    "task.verifier_processes=1",
    "rollout.prompts=16",
    "evaluation.samples=64",
    "run.threads=1",
]
"""What the runs of `tiny` have beyond the trainer's `demo-tiny`."""
SMOLLM2 = [
    "policy.precision=full",
    "policy.assistant_prefix=The answer is",
    "algorithm.beta=0",
    "task.held_out=128",
    "task.verifier_processes=1",
    "rollout.prompts=4",
    "rollout.max_new_tokens=6",
    "rollout.batch_size=256",
    "evaluation.samples=64",
    "run.threads=1",
]
"""What those of SmolLM2-135M have beyond `demo-smollm2-135m`."""
MOVES_EVERY = 25
"""Steps after which the moving reference is set to the policy."""


@dataclass(frozen=True)
class Arm:
    """A way to learn from the same rollouts.

    Attributes:
        settings: of the trainer, beyond those of the task.
        advantages: the function of `experiments.advantages` that makes them, if the trainer's are not used.
        moving: whether the reference is set to the policy every `MOVES_EVERY` steps.
        seeds: how many, of `tiny`.
    """

    settings: tuple[str, ...]
    advantages: str = ""
    moving: bool = False
    seeds: int = 4


GRPO = ("algorithm.name=grpo",)
ACE = ("algorithm.name=ace-grpo",)
DAPO = ("algorithm.max_resamples=0", "algorithm.overlong_fraction=0")
MAIN = 8
ARMS = {
    "grpo": Arm(GRPO, seeds=MAIN),
    "ace-grpo": Arm(ACE, seeds=MAIN),
    "dapo": Arm(("algorithm.name=dapo", *DAPO), seeds=MAIN),
    "ace-dapo": Arm(("algorithm.name=ace-dapo", *DAPO), seeds=MAIN),
    "constant": Arm(GRPO, "constant", seeds=MAIN),
    "shuffled": Arm(GRPO, "shuffled", seeds=MAIN),
    "low-rate": Arm((*GRPO, "optim.learning_rate=1.25e-4")),
    "kl": Arm((*GRPO, "algorithm.beta=0.1")),
    "entropy": Arm((*GRPO, "algorithm.entropy_coef=0.01")),
    "nsr": Arm((*GRPO, "algorithm.advantages=nsr")),
    "w-reinforce": Arm((*GRPO, "algorithm.advantages=w_reinforce")),
    "arm": Arm(GRPO, "arm"),
    "lens": Arm(GRPO, "lens"),
    "pass@k": Arm((*GRPO, "algorithm.advantages=grpo_passk")),
    "ace-0.5": Arm((*ACE, "algorithm.alpha=0.5")),
    "ace-2": Arm((*ACE, "algorithm.alpha=2")),
    "ace-4": Arm((*ACE, "algorithm.alpha=4")),
    "ace-relu": Arm((*ACE, "algorithm.shape=relu")),
    "ace-sum": Arm((*ACE, "algorithm.confidence_reduction=sum")),
    "ace-moving": Arm(ACE, moving=True),
    "grpo-twice": Arm((*GRPO, "optim.updates_per_batch=2")),
    "ace-twice": Arm((*ACE, "optim.updates_per_batch=2")),
    "ace-twice-old": Arm((*ACE, "optim.updates_per_batch=2", "algorithm.confidence=old")),
}
"""The main comparison, the controls, other losses, and what ACE hangs on. alpha = 0 is `grpo`, bit for bit."""


@dataclass(frozen=True)
class Setup:
    """A model on a task.

    Attributes:
        settings: of the trainer, beyond those of `demo`.
        evaluated: updates after which a run is evaluated; the last is its end.
        seeds: how many of each arm.
        part: problems that are evaluated between two looks at the clock.
        shared_prompts: whether a prompt is read once for all its completions.
    """

    demo: str
    settings: list[str]
    evaluated: tuple[int, ...]
    seeds: dict[str, int]
    part: int
    shared_prompts: bool = False


def tiny(*settings: str) -> Setup:
    """`tiny` on a task."""
    seeds = {name: arm.seeds for name, arm in ARMS.items()}
    return Setup("demo-tiny", [*TINY, *settings], (0, 10, 25, 50, 100, 200, 300, 400), seeds, part=128)


def longer(*settings: str) -> Setup:
    """`tiny` on a task that is not saturated after the updates of the others: three times as many."""
    evaluated = (0, 10, 25, 50, 100, 200, 300, 400, 600, 800, 1000, 1200)
    return Setup("demo-tiny", [*TINY, *settings], evaluated, {"grpo": 4, "ace-grpo": 4}, part=128)


def smollm2(*settings: str) -> Setup:
    """SmolLM2-135M on a task. Its evaluations cost as much as twenty-five updates, hence so few."""
    seeds = {"grpo": 3, "ace-grpo": 3}
    return Setup("demo-smollm2-135m", [*SMOLLM2, *settings], (0, 15, 40), seeds, part=4, shared_prompts=True)


CHAIN_SUM = (
    "task.name=chain_sum",
    "task.parameters={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}",
)
LCM = "task.name=lcm", "task.parameters={min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 20}"
GCD = "task.name=gcd", "task.parameters={min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 99}"
TASKS = {
    "chain_sum": tiny(*CHAIN_SUM, "rollout.max_new_tokens=4"),
    "lcm": tiny(*LCM, "rollout.max_new_tokens=4"),
    "gcd": tiny(*GCD, "rollout.max_new_tokens=3"),
    "chain_sum-longer": longer(*CHAIN_SUM, "rollout.max_new_tokens=4"),
    "smollm2-chain_sum": smollm2(*CHAIN_SUM),
    "smollm2-gcd": smollm2(*GCD),
}
"""The reasoning-gym generators on which plain GRPO trades Pass@64 for Pass@1."""
ON_TINY = "chain_sum", "lcm", "gcd"
LONGER = "chain_sum-longer"
ON_SMOLLM2 = "smollm2-chain_sum", "smollm2-gcd"


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    arm: str
    seed: int
    setup: Setup = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "setup", TASKS[self.task])

    @property
    def name(self) -> str:
        """`chain_sum/grpo/0`."""
        return f"{self.task}/{self.arm}/{self.seed}"

    @cached_property
    def config(self) -> Config:
        """The trainer's settings."""
        run = [f"run.seed={self.seed}", f"run.steps={self.setup.evaluated[-1]}"]
        return load(self.setup.demo, [*self.setup.settings, *ARMS[self.arm].settings, *run])

    @classmethod
    def named(cls, name: str) -> "Cell":
        """The planned cell of a name.

        Raises:
            ValueError: no such task, or no such arm or seed of it.
        """
        task, _, rest = name.partition("/")
        arm, _, seed = rest.partition("/")
        if task not in TASKS:
            raise ValueError(f"no cell is called {name!r}: it must be TASK/ARM/SEED, TASK one of {', '.join(TASKS)}")
        seeds = TASKS[task].seeds
        if arm not in seeds:
            raise ValueError(f"no cell is called {name!r}: the arms of {task} are {', '.join(seeds)}")
        if not seed.isdecimal() or int(seed) >= seeds[arm]:
            raise ValueError(f"no cell is called {name!r}: the seeds of {task}/{arm} are 0 to {seeds[arm] - 1}")
        return cls(task, arm, int(seed))


def cells() -> list[Cell]:
    """All runs, seed by seed, so that runs that are compared follow one another on one machine.

    Those of SmolLM2 take turns with their tasks: two on one task would wait for one evaluation of its start.
    """
    arms = list(ARMS)
    return [
        *sorted(_cells(*ON_TINY), key=lambda cell: cell.seed),
        *sorted(_cells(LONGER), key=lambda cell: cell.seed),
        *sorted(_cells(*ON_SMOLLM2), key=lambda cell: (cell.seed, arms.index(cell.arm))),
    ]


def _cells(*tasks: str) -> list[Cell]:
    """Those of each task, arm by arm."""
    return [
        Cell(task, arm, seed) for task in tasks for arm, count in TASKS[task].seeds.items() for seed in range(count)
    ]
