"""The training loop, to be read from top to bottom.

    sample prompts -> roll out G completions each -> verify -> advantages -> reference (and old) scores
    -> loss on micro-batches over the global denominator -> step -> log -> evaluate -> checkpoint

All mathematics is `rlvr_ops`: advantages, scores, losses, Pass@k. What this loop leaves out on purpose: more than one
process, sampling by another engine, replay of old rollouts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlvr_ops
from rlvr_trainer import checkpoints
from rlvr_trainer.config import Config
from rlvr_trainer.console import RunLog
from rlvr_trainer.evaluation import evaluate
from rlvr_trainer.metrics import StepMetrics
from rlvr_trainer.policies import Policy, load_policy
from rlvr_trainer.prompt_limit import fit_prompts
from rlvr_trainer.report import summarise
from rlvr_trainer.rollouts import Batch, Rollouts, collect
from rlvr_trainer.scoring import hidden_states_of, scores_of
from rlvr_trainer.session import Clock, asked_to_stop, claim_folder
from rlvr_trainer.tasks import Task, make_task


@dataclass
class MicroBatch:
    """Some rollouts of a step with everything the loss needs to know about them."""

    rollouts: Rollouts
    advantages: Tensor
    ref_per_token_logps: Tensor
    old_per_token_logps: Tensor | None


def train(config: Config, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run `config.run.steps` steps in `config.run.out`; gives what is in its `summary.json`.

    Raises:
        ConfigError: settings that cannot be used, a folder that holds a run already, or nothing to resume from.
        FloatingPointError: a gradient that is not finite.
    """
    config.algorithm.probe()
    run = Path(config.run.out)
    clock = Clock()
    made = claim_folder(run, resume=resume, overwrite=overwrite)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    task = make_task(config.task, config.run.seed)  # before the model: bad data should not cost a minute of loading
    if config.policy.name == "tiny" and not resume and not quiet:
        print(f"teaching tiny the format of {config.task.title}, {config.policy.warm_start_steps} updates", flush=True)
    policy = load_policy(config, task, made)
    dropped = fit_prompts(policy, task, config)
    reference = policy.frozen()
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.optim.learning_rate,
        betas=(config.optim.betas[0], config.optim.betas[1]),
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    torch.manual_seed(config.run.seed)
    step, cursor = 0, 0
    if resume:
        step, cursor = checkpoints.restore(checkpoints.latest(run), model=policy.model, optimizer=optimizer)
        policy.refresh_sampler()
    log = RunLog(run, first_step=step, quiet=quiet)
    (run / "config.yaml").write_text(config.to_yaml())
    clock.lap("load")
    log.say(
        f"{config.policy.name} on {policy.device}, {config.task.title}, {config.algorithm.title()}; writing to {run}"
    )
    if dropped:
        log.say(dropped)
    try:
        if step == 0:
            _evaluate(policy, task, config, log, step)
            clock.lap("evaluate")
        with asked_to_stop() as stop:
            while step < config.run.steps:
                batch, cursor = collect(policy, task, cursor, config)
                values = update(policy, reference, optimizer, batch, config, step)
                step += 1
                values["perf/seconds_step"] = clock.lap("train")
                values["perf/tokens_per_second"] = values["num_tokens"] / values["perf/seconds_step"]
                log.metrics(step, values)
                log.progress(step, config.run.steps, values)
                if config.run.log_completions:
                    log.completions(step, batch)
                if config.run.table_every and (step % config.run.table_every == 0 or step == 1):
                    log.table(batch)
                if step == config.run.steps or (config.evaluation.every and step % config.evaluation.every == 0):
                    _evaluate(policy, task, config, log, step)
                    clock.lap("evaluate")
                every = config.run.checkpoint_every
                if stop.is_set() or (every and (step % every == 0 or step == config.run.steps)):
                    saved = checkpoints.save(
                        run,
                        step,
                        config.run.keep_checkpoints,
                        model=policy.model,
                        optimizer=optimizer,
                        cursor=cursor,
                    )
                    clock.lap("save")
                    if stop.is_set() and step < config.run.steps:
                        log.say(f"interrupted: saved {saved}; continue with: rlvr-ops train --resume {run}")
                        return {"interrupted_at": step, "checkpoint": str(saved)}
        policy.save(run / "model")
        clock.lap("save")
        return summarise(run, config, log, step, clock.total)
    finally:
        log.close()
        task.close()


def update(
    policy: Policy, reference: Policy, optimizer: torch.optim.Optimizer, batch: Batch, config: Config, step: int
) -> dict[str, float]:
    """Optimiser steps on one batch of rollouts, and the step's metrics. A batch with no group left changes nothing."""
    tokens = float(batch.rollouts.completion_mask.sum())
    rate = config.optim.learning_rate * min(1.0, (step + 1) / max(config.optim.warmup_steps, 1))
    values = {**batch.metrics, "num_tokens": tokens, "learning_rate": rate}
    if len(batch.rollouts) == 0:
        return values
    for group in optimizer.param_groups:
        group["lr"] = rate
    parts = list(micro_batches(policy, reference, batch, config))
    items = max(tokens, 1.0) if config.objective.aggregation == "dapo" else float(len(batch.rollouts))
    for _ in range(config.optim.updates_per_batch):
        metrics, total = StepMetrics(), torch.zeros((), device=policy.device)
        for part in parts:
            output = loss_of(policy, part, config, items)
            output.loss.backward()
            total += output.loss.detach()
            metrics.add(
                output.metrics,
                tokens=float(part.rollouts.completion_mask.sum()),
                wrong=float((part.advantages < 0).sum()),
            )
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm))
        if not norm < float("inf"):
            raise FloatingPointError(f"the gradient norm of step {step + 1} is {norm}: no update was made")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    policy.refresh_sampler()
    return {**values, "loss": float(total), "grad_norm": norm, **metrics.result()}


def micro_batches(policy: Policy, reference: Policy, batch: Batch, config: Config) -> Iterator[MicroBatch]:
    """The batch in parts, scored by the reference, and by the policy itself if several updates make it move."""
    off_policy = config.optim.updates_per_batch > 1
    for start in range(0, len(batch.rollouts), config.optim.micro_batch):
        rows = list(range(start, min(start + config.optim.micro_batch, len(batch.rollouts))))
        rollouts = batch.rollouts.select(rows)
        yield MicroBatch(
            rollouts=rollouts,
            advantages=batch.advantages[rows],
            ref_per_token_logps=scores_of(reference, rollouts, config.rollout.temperature),
            old_per_token_logps=scores_of(policy, rollouts, config.rollout.temperature) if off_policy else None,
        )


def loss_of(policy: Policy, part: MicroBatch, config: Config, items: float) -> rlvr_ops.LossOutput:
    """This micro-batch's share of the loss of the whole batch, which has `items` tokens or rollouts."""
    rollouts = rlvr_ops.Rollouts(
        part.rollouts.completion_ids,
        part.advantages,
        ref_per_token_logps=part.ref_per_token_logps,
        old_per_token_logps=part.old_per_token_logps,
        completion_mask=part.rollouts.completion_mask,
        num_items_in_batch=items,
    )
    head = replace(policy.head, temperature=config.rollout.temperature)
    plan = rlvr_ops.Plan(with_entropy=True, score_inactive=True)  # entropy and KL then are means over every token
    with policy.autocast():
        hidden = hidden_states_of(policy, part.rollouts)
        return rlvr_ops.policy_loss(hidden, head, rollouts, config.objective, plan)


def _evaluate(policy: Policy, task: Task, config: Config, log: RunLog, step: int) -> None:
    found = evaluate(policy, task, config)
    log.evaluation(step, found.to_dict())
    values = found.metrics()
    log.metrics(step, values)
    shown = [f"pass@{k} {v:.3f}" for k, v in ((n[10:], values[n]) for n in values if n[10:].isdigit())]
    log.say(f"held out at step {step}:  " + "  ".join(shown))
