"""`rlvr-ops train | serve | eval | judge | plot | demo | doctor | env`. What is slow to import waits until a command needs it."""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rlvr_trainer.judging import WorkerError, command
from rlvr_trainer.parsing import ConfigError, nearest
from rlvr_trainer.printing import mute
from rlvr_trainer.sampling.sampler import SamplerError
from rlvr_trainer.stopping import Signalled
from rlvr_trainer.writing import WriteError

DEMOS = {"smollm2-135m": "demo-smollm2-135m", "tiny": "demo-tiny"}
SHIPPED = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.yaml"))
NEEDED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "yaml",
    "reasoning_gym",
    "math_verify",
    "matplotlib",
    "gguf",
)
BROKEN_PIPE = 141  # as a shell says of what SIGPIPE ended


def main(arguments: list[str] | None = None) -> int:
    """Run one command and give its exit code.

    0 if it went well, 1 if it failed, diverged or found no room on the disk, 2 for settings that cannot be used, 130, 143 or
    129 if Ctrl-C, SIGTERM or SIGHUP ended it, 141 if nobody reads what it prints.
    """
    _print_in_any_encoding()
    _be_quiet_if_no_terminal()
    try:
        parsed = _parse(arguments)
        code: int = parsed.command(parsed)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _fail(str(error), 2)
    except (WriteError, WorkerError, SamplerError, FloatingPointError) as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        return _fail(f"this needs {error.name}: in the repository's root, pip install '.[train]'", 1)
    except BrokenPipeError:
        mute()
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 1)  # that cannot be read, or is too long for a name
    except Signalled as signalled:
        return _fail(str(signalled), signalled.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted, nothing was saved", 130)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        print(f"rlvr-ops: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Says how settings are written to those who write them as options."""

    def error(self, message: str) -> NoReturn:
        """One line, and exit code 2."""
        raise ConfigError(f"{message} (rlvr-ops {self.prog.partition(' ')[2] or 'COMMAND'} --help says what there is)")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere, behind an option too. What `serve` gets behind -- is vLLM's."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if arguments[:1] == ["serve"] and "--" in arguments else len(arguments)
    parsed, rest = parser.parse_known_args(arguments[:end])
    parsed.behind = arguments[end + 1 :]
    if parsed.command is None:
        parser.error("which command?")
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) < len(rest) and parsed.command is _serve:
        raise ConfigError(f"vLLM's own options go behind --: rlvr-ops serve {parsed.model} -- {' '.join(rest)}")
    if len(overrides) < len(rest):
        _refuse_option(next(text for text in rest if text not in overrides))
    if overrides and not hasattr(parsed, "overrides"):
        raise ConfigError(f"this command takes no settings, got {overrides[0]}")
    if overrides:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def _refuse_option(text: str) -> NoReturn:
    from rlvr_trainer.config import Config
    from rlvr_trainer.names import meant_by, settings_of

    if not text.startswith("-"):
        raise ConfigError(f"one argument too many: {text!r}; a setting is written section.key=value")
    meant = meant_by(text.lstrip("-").partition("=")[0], settings_of(Config))
    hint = f": did you mean {' or '.join(meant)}? A" if meant else ": a"
    raise ConfigError(f"unknown option {text}{hint} setting is written section.key=value")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rlvr-ops", description="Reinforcement learning with verifiable rewards.", allow_abbrev=False)
    parser.add_argument(
        "--version", action="store_const", const=_version, dest="command", help="say which version this is"
    )
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train a policy", allow_abbrev=False)
    train.add_argument("config", nargs="?", help=f"a YAML file, or one of: {', '.join(SHIPPED)}")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--out", help="the run folder (the same as run.out=...)")
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its last checkpoint")
    train.add_argument(
        "--from", dest="start_from", metavar="STEP", help="with --resume: from this checkpoint, step-000004"
    )
    train.add_argument("--keep-best", action="store_true", help="the same as run.keep_best=true")
    train.set_defaults(command=_train)

    serve = commands.add_parser(
        "serve", help="serve a model by vLLM, for rollout.backend=vllm-server", allow_abbrev=False
    )
    serve.add_argument("model", help="smollm2-135m, the folder of a run or of a model, or a name that vLLM can load")
    serve.add_argument(
        "--host", default="127.0.0.1", help="anybody who reaches it may change the weights (%(default)s)"
    )
    serve.add_argument("--port", type=int, default=8000, help="%(default)s")
    serve.add_argument(
        "--dtype", default="auto", help="that it computes in: bfloat16, float32, ... (default: the stored weights')"
    )
    serve.epilog = "Behind -- come further options of vLLM's server: rlvr-ops serve MODEL -- --max-model-len 4096"
    serve.set_defaults(command=_serve)

    evaluate = commands.add_parser("eval", help="Pass@k on held-out problems", allow_abbrev=False)
    evaluate.add_argument(
        "path", help="a run folder, a checkpoint or another Hugging Face folder, or settings as for train"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument("--config", help="the settings, if it is not those of the run that the folder belongs to")
    evaluate.add_argument(
        "--out", type=Path, help="where completions.jsonl goes; by default RUN/eval/NAME or eval/NAME"
    )
    evaluate.set_defaults(command=_evaluate)

    plot = commands.add_parser("plot", help="draw report.png from a run folder", allow_abbrev=False)
    plot.add_argument("run", type=Path)
    plot.set_defaults(command=_plot)

    command.add_to(commands)

    demo = commands.add_parser(
        "demo", help="a small language model gets better at sums, in minutes, on a CPU", allow_abbrev=False
    )
    demo.add_argument("--model", default="smollm2-135m", help=f"one of: {', '.join(DEMOS)}")
    demo.add_argument("--seed", default="0")
    demo.add_argument("--out", help="the run folder; a run that is there already is overwritten")
    demo.add_argument("--keep-best", action="store_true", help="the same as run.keep_best=true")
    demo.add_argument("overrides", nargs="*", metavar="section.key=value")
    demo.set_defaults(command=_demo)

    doctor = commands.add_parser("doctor", help="check the installation: what works here, and what does not")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value")
    doctor.set_defaults(command=_doctor)

    env = commands.add_parser("env", help="versions and devices, for bug reports")
    env.set_defaults(command=_env)
    return parser


def _train(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.config import load
    from rlvr_trainer.loop import train

    source, overrides = parsed.config, _overrides(parsed)
    if source is not None and "=" in source:
        overrides.insert(0, source)
        source = None
    if parsed.resume is None:
        if parsed.start_from is not None:
            raise ConfigError("--from goes with --resume RUN")
        return _exit_code(train(load(source, overrides)))
    run = Path(parsed.resume)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"cannot resume: {run} holds no config.yaml and so no run")
    if source is not None:
        raise ConfigError(f"--resume takes its settings from {run}/config.yaml: give overrides, not {source!r}")
    if any(text.startswith("run.out=") for text in overrides):
        raise ConfigError(f"--resume continues in {run}, and so takes no --out: for another folder, start a new run")
    config = load(run / "config.yaml", [*overrides, f"run.out={run}"])
    return _exit_code(train(config, resume=True, start_from=parsed.start_from))


def _demo(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.config import load
    from rlvr_trainer.loop import train

    if parsed.model not in DEMOS:
        raise ConfigError(f"unknown --model {parsed.model!r}{nearest(parsed.model, DEMOS)}")
    out = f"run.out=runs/demo-{parsed.model}-{parsed.seed}"
    config = load(DEMOS[parsed.model], [f"run.seed={parsed.seed}", out, *_overrides(parsed)])
    return _exit_code(train(config, overwrite=True))


def _overrides(parsed: argparse.Namespace) -> list[str]:
    """The settings given one by one, those that have an option of their own included."""
    found: list[str] = list(parsed.overrides)
    if parsed.out is not None:
        found.append(f"run.out={parsed.out}")
    if parsed.keep_best:
        found.append("run.keep_best=true")
    return found


def _exit_code(found: dict[str, object]) -> int:
    number = found.get("signal")
    return 128 + number if isinstance(number, int) else 0


def _serve(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.sampling.serve import serve

    return serve(parsed.model, host=parsed.host, port=parsed.port, dtype=parsed.dtype, arguments=parsed.behind)


def _evaluate(parsed: argparse.Namespace) -> int:
    import json

    from rlvr_trainer.eval_command import evaluate_path

    print(json.dumps(evaluate_path(parsed.path, parsed.overrides, config=parsed.config, out=parsed.out), indent=2))
    return 0


def _plot(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.report import plot

    print(plot(parsed.run))
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.doctor import examine

    return examine(parsed.overrides)


def _env(parsed: argparse.Namespace) -> int:
    from rlvr_trainer.doctor import environment

    print("\n".join(environment()))
    return 0


def _version(parsed: argparse.Namespace) -> int:
    from importlib import metadata

    try:
        print(f"rlvr-ops {metadata.version('rlvr-ops')}")
    except metadata.PackageNotFoundError:  # a copy of the source on the path
        print("rlvr-ops, not installed")
    return 0


def _print_in_any_encoding() -> None:
    """A completion may hold what the terminal cannot show: it is then written as \\u2026, and nothing fails."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _be_quiet_if_no_terminal() -> None:
    """No loading bars in log files. Set before transformers and tqdm are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
