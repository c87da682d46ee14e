"""`rlvr-ops eval`: Pass@k of a run, of one of its checkpoints, of any Hugging Face folder, or of what settings name."""

import json
import sys
from pathlib import Path
from typing import Any

from rlvr_trainer.checkpoints import list_checkpoints
from rlvr_trainer.config import Config, load
from rlvr_trainer.evaluation import Answers, answer
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import load_policy
from rlvr_trainer.prompt_limit import fit_prompts
from rlvr_trainer.sampling import check_installed
from rlvr_trainer.sampling.generate import cpu_threads
from rlvr_trainer.tasks import make_task
from rlvr_trainer.writing import write_text, writing


def evaluate_path(
    path: str, overrides: list[str], config: str | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Evaluate what `path` names; its numbers, and every completion in a file.

    The settings are `config`, else those of the run that the folder belongs to. `out` is RUN/eval/NAME by default, and
    eval/NAME where there is no run.

    Raises:
        ConfigError: a folder without a model, or a model without a task to evaluate it on.
    """
    model, run = _model_and_run(Path(path))
    settings = _settings(path, model, run, overrides, config)
    check_installed(settings)
    name = Path(settings.policy.name).name if model is None else model.resolve().name
    answers = _answers(settings)
    evaluation = answers.evaluation(settings.evaluation.samples)
    values = evaluation.metrics()
    if evaluation.unjudged():
        print(evaluation.unjudged_sentence(), file=sys.stderr)
    found = {"model": settings.policy.name, "task": settings.task.title, **values}
    folder = out or (run or Path()) / "eval" / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in answers.rows()]
    write_text(folder / "completions.jsonl", "".join(rows))
    found["completions"] = str(folder / "completions.jsonl")
    write_text(folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    return found


def _model_and_run(path: Path) -> tuple[Path | None, Path | None]:
    """The folder with the model and that of its run, as far as there are any."""
    if (path / "config.json").is_file():
        parents = path.resolve().parents[:2]
        return path, next((parent for parent in parents if (parent / "config.yaml").is_file()), None)
    if (path / "config.yaml").is_file():
        models = [path / "model"] if (path / "model").is_dir() else list_checkpoints(path)[-1:]
        if not models:
            raise ConfigError(
                f"{path} holds no model: the run did not finish; continue it with rlvr-ops train --resume {path}"
            )
        return models[0], path
    if path.is_dir():
        raise ConfigError(f"{path} holds neither a run (config.yaml) nor a model (config.json)")
    return None, None


def _settings(path: str, model: Path | None, run: Path | None, overrides: list[str], config: str | None) -> Config:
    if model is None and config is None:
        return load(None, [path, *overrides]) if "=" in path else load(path, overrides)
    if model is None:
        return load(config, [f"policy.name={path}", *overrides])
    source = config or (run and run / "config.yaml")
    if source is None and not any(text.startswith("task.") for text in overrides):
        raise ConfigError(f"{path} belongs to no run: say what to evaluate it on, with task.name=... or --config")
    return load(source, [f"policy.name={model}", *overrides])


def _answers(config: Config) -> Answers:
    task = make_task(config.task, config.run.seed)
    try:
        with cpu_threads(config.run.threads):
            policy = load_policy(config, task)
            dropped = fit_prompts(policy, task, config)
            for notice in (*task.notices, dropped):
                if notice:
                    print(notice, file=sys.stderr)
            policy.start_sampler(config)
            try:
                return answer(policy, task, config)
            finally:
                policy.close()
    finally:
        task.close()
