"""The training loop, to be read from top to bottom.

    sample prompts -> roll out G completions each -> verify -> advantages -> reference (and old) scores
    -> loss on micro-batches over the global denominator -> step -> log -> evaluate -> checkpoint

All mathematics is `rlvr_ops`: advantages, scores, losses, Pass@k. What this loop leaves out on purpose: more than one
training process, replay of old rollouts.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlvr_ops
from rlvr_trainer import checkpoints
from rlvr_trainer.checkpoints import Checkpoint, Place
from rlvr_trainer.config import Config
from rlvr_trainer.console import RunLog
from rlvr_trainer.evaluation import Evaluation, best_of, evaluate
from rlvr_trainer.metrics import StepMetrics
from rlvr_trainer.policies import Policy, load_policy
from rlvr_trainer.printing import say
from rlvr_trainer.prompt_limit import fit_prompts
from rlvr_trainer.report import summarise
from rlvr_trainer.resuming import changed_settings, refuse_others
from rlvr_trainer.rollouts import Batch, Rollouts, collect
from rlvr_trainer.sampling import check_installed
from rlvr_trainer.sampling.ahead import Ahead
from rlvr_trainer.sampling.mismatch import Mismatch
from rlvr_trainer.scoring import hidden_states_of, scores_of
from rlvr_trainer.session import INITIAL_POLICY, Clock, claimed, drop_results, start_anew
from rlvr_trainer.stopping import Stop, Stopped, asked_to_stop
from rlvr_trainer.tasks import Task, make_task
from rlvr_trainer.writing import WriteError, whole_folder, write_text


@dataclass
class MicroBatch:
    """Some rollouts of a step with everything the loss needs to know about them."""

    rollouts: Rollouts
    advantages: Tensor
    ref_per_token_logps: Tensor
    old_per_token_logps: Tensor | None
    sampling_per_token_logps: Tensor | None


@dataclass
class Learner:
    """What training changes, and the reference that stays: a checkpoint holds all of it."""

    policy: Policy
    reference: Policy
    optimizer: torch.optim.Optimizer
    fingerprint: str  # of the task's problems
    place: Place
    notices: list[str]  # about the data
    whole: bool = True  # not in the middle of an update

    def save(self, config: Config, best: tuple[int, float] | None = None) -> Path:
        """A checkpoint of the last finished step; that of the `best` step is kept too."""
        return checkpoints.save(
            Path(config.run.out),
            self.place,
            self.policy,
            self.optimizer,
            fingerprint=self.fingerprint,
            keep=config.run.keep_checkpoints,
            best=best[0] if best else None,
        )


def train(
    config: Config,
    *,
    resume: bool = False,
    start_from: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run `config.run.steps` steps in `config.run.out`; gives what is in its `summary.json`.

    SIGINT, SIGTERM and SIGHUP end it early: it saves a checkpoint of the last finished step and gives `interrupted_at`,
    `checkpoint` and `signal`. `resume` goes on from the last checkpoint, or from that called `start_from`.

    Raises:
        ConfigError: settings that cannot be used, a folder that holds a run already, or nothing to resume from.
        WriteError: the disk is full, or a file of the run cannot be written.
        FloatingPointError: a gradient that is not finite.
        Stopped: a signal came before training began, or a second one.
    """
    config.algorithm.probe()
    check_installed(config)
    run = Path(config.run.out)
    notes = changed_settings(run, config) if resume else []
    with claimed(run, resume=resume, overwrite=overwrite), asked_to_stop() as stop:
        checkpoint = checkpoints.find(run, start_from) if resume else None
        clock, task, learner = Clock(), None, None
        try:
            with stop.at_once():
                task = make_task(config.task, config.run.seed)  # before the model: bad data should not cost its loading
                learner = _begin(config, task, checkpoint, quiet)
            write_text(run / "config.yaml", config.to_yaml())
            if checkpoint is None and config.run.checkpoint_every:
                learner.save(config)  # before anything is logged: from here on there is something to resume
            log = RunLog(run, learner.place.step if checkpoint else None, quiet)
            clock.lap("load")
            log.say(
                f"{config.policy.name} on {learner.policy.device}, {config.task.title}, {config.algorithm.title()};"
                f" writing to {run}"
            )
            for notice in (_sampling(learner, config), *learner.notices):
                log.say(notice)
            if notes:
                log.say(f"changed since step {learner.place.step}: {', '.join(notes)}")
            return _learn(learner, task, config, log, stop, clock)
        except WriteError as error:
            last = checkpoints.list_checkpoints(run)[-1:]
            go_on = f"go on from {last[0]} with: {_resuming(config)}" if last else "there is no checkpoint yet"
            raise WriteError(f"{error}; {go_on}") from error
        finally:
            if learner is not None:
                learner.policy.close()
            if task is not None:
                task.close()


def _sampling(learner: Learner, config: Config) -> str:
    correction = config.objective.sampling
    corrected = f"corrected by {correction.kind} at {correction.clip_max}" if correction else "not corrected"
    kind = str(learner.policy.sampler.dtype).removeprefix("torch.")
    return f"sampling by {config.rollout.backend} in {kind}, {corrected}"


def _begin(config: Config, task: Task, checkpoint: Checkpoint | None, quiet: bool) -> Learner:
    """The policy at its initial weights with its reference, then where the checkpoint has it."""
    if checkpoint is None and config.policy.name == "tiny" and not quiet:
        say(f"teaching tiny the format of {config.task.title}, {config.policy.warm_start_steps} updates")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    run = Path(config.run.out)
    policy = load_policy(config, task, None if checkpoint is None else run / INITIAL_POLICY)
    notices = [*task.notices]
    if dropped := fit_prompts(policy, task, config):
        notices.append(dropped)
    if checkpoint is not None:
        refuse_others(checkpoint, task, config)  # now that what does not fit is gone
    else:
        start_anew(run)
        if config.policy.name == "tiny":
            with whole_folder(run / INITIAL_POLICY) as folder:
                policy.save(folder)
    reference = policy.frozen()
    optimizer = make_optimizer(policy, config)
    torch.manual_seed(config.run.seed)
    place = Place() if checkpoint is None else checkpoints.restore(checkpoint, policy, optimizer)
    if not config.rollout.asynchronous:
        place.ahead = None  # of a run that sampled ahead until now: nothing would correct for the step between
    policy.start_sampler(config)  # last: an engine takes its time, and what it holds is given back by `train`
    return Learner(policy, reference, optimizer, task.fingerprint(), place, notices)


def make_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW over what trains, as `config.optim` says."""
    return torch.optim.AdamW(
        [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
        lr=config.optim.learning_rate,
        betas=(config.optim.betas[0], config.optim.betas[1]),
        weight_decay=config.optim.weight_decay,
        fused=True,
    )


def _learn(learner: Learner, task: Task, config: Config, log: RunLog, stop: Stop, clock: Clock) -> dict[str, Any]:
    """Steps with their evaluations and checkpoints until the last one, or until somebody asks to stop.

    What `stop.at_once` holds is given up when that happens, and done again from the same state when the run goes on.
    """
    run, best = Path(config.run.out), _best(log, config, learner.place.step)
    try:
        while True:
            step = learner.place.step
            if _evaluation_is_due(step, config) and not log.evaluated(step):
                with stop.at_once():
                    found = evaluate(learner.policy, task, config)
                _log_evaluation(found, log, step)
                clock.lap("evaluate")
            best = _best(log, config, step)
            if _checkpoint_is_due(step, config) or (best and best[0] == step):
                learner.save(config, best)
                clock.lap("save")
            if step == config.run.steps:
                break
            with stop.at_once():
                batch, cursor = learner.place.ahead or collect(learner.policy, task, learner.place.cursor, config)
            drop_results(run)  # of a run that had come to its end: they would be taken for those of this one
            values, failure = _step(learner, task, batch, cursor, config)
            values["perf/seconds_step"] = clock.lap("train")
            values["perf/tokens_per_second"] = values["num_tokens"] / values["perf/seconds_step"]
            try:
                if failure:
                    raise failure
                learner.policy.refresh_sampler()
            finally:  # a sampler that is gone takes no finished step with it
                values["perf/seconds_push"] = clock.lap("push")
                _log_step(values, batch, config, log, step + 1)
    except Stopped as stopped:
        saved = learner.save(config, best)
        log.say(f"interrupted: saved {saved}; continue with: {_resuming(config)}")
        return {"interrupted_at": learner.place.step, "checkpoint": str(saved), "signal": stopped.number}
    except WriteError:
        raise
    except Exception:
        if learner.whole:
            saved = learner.save(config, best)
            log.say(f"failed after step {learner.place.step}: saved {saved}; continue with: {_resuming(config)}")
        raise
    finally:
        log.close()
    with whole_folder(run / "model") as folder:
        learner.policy.save(folder)
    clock.lap("save")
    return summarise(run, config, log, step, clock.total, best)


def _step(
    learner: Learner, task: Task, batch: Batch, cursor: int, config: Config
) -> tuple[dict[str, float], BaseException | None]:
    """Learn from a batch and, if that is asked for, sample the next one meanwhile by the weights of before.

    Gives the step's metrics, and what went wrong with the sampling, which takes nothing from the step.
    """
    step, drawn, ahead = learner.place.step, checkpoints.random_state(), None
    learner.whole = False
    if config.rollout.asynchronous and step + 1 < config.run.steps:
        ahead = Ahead(lambda: collect(learner.policy, task, cursor, config, policy_lag=1))
    try:
        values = update(learner.policy, learner.reference, learner.optimizer, batch, config, step)
        sampled = ahead.wait() if ahead else None
    except BaseException:
        if ahead:  # its thread must not outlive this one's work
            learner.policy.close()
            ahead.wait()
        raise
    failure = ahead.error if ahead else None
    learner.place = Place(step + 1, cursor, drawn if failure else checkpoints.random_state(), sampled)
    learner.whole = True
    return values, failure


def _best(log: RunLog, config: Config, step: int) -> tuple[int, float] | None:
    """Step and Pass@1 of the best evaluation of which there is a checkpoint, or will be in a moment."""
    kept = {int(path.name[5:]) for path in checkpoints.list_checkpoints(Path(config.run.out))} | {step}
    return best_of([row for row in log.evaluations if row["step"] in kept]) if config.run.keep_best else None


def _evaluation_is_due(step: int, config: Config) -> bool:
    every = config.evaluation.every
    return step in (0, config.run.steps) or (every > 0 and step % every == 0)


def _checkpoint_is_due(step: int, config: Config) -> bool:
    every = config.run.checkpoint_every
    return every > 0 and (step == config.run.steps or step % every == 0)


def _resuming(config: Config) -> str:
    return f"rlvr-ops train --resume {shlex.quote(config.run.out)}"


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
    mismatch = Mismatch(config.objective.sampling)
    for again in range(config.optim.updates_per_batch):
        metrics, total = StepMetrics(), torch.zeros((), device=policy.device)
        for part in parts:
            output = loss_of(policy, part, config, items)
            output.loss.backward()
            total += output.loss.detach()
            if not again:
                mismatch.add(output.per_token_logps, part.rollouts.sampling_logps, part.rollouts.completion_mask)
            metrics.add(
                output.metrics,
                tokens=float(part.rollouts.completion_mask.sum()),
                wrong=float((part.advantages < 0).sum()),
            )
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm))
        if not norm < float("inf"):
            raise FloatingPointError(f"the gradient norm of step {step + 1} is {norm}: this update was not made")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {**values, "loss": float(total), "grad_norm": norm, **metrics.result(), **mismatch.metrics()}


def micro_batches(policy: Policy, reference: Policy, batch: Batch, config: Config) -> Iterator[MicroBatch]:
    """The batch in parts, scored by the reference, and by the policy itself if it moves, or something else sampled."""
    corrected = config.objective.sampling is not None
    scored = corrected or config.optim.updates_per_batch > 1
    for start in range(0, len(batch.rollouts), config.optim.micro_batch):
        rows = list(range(start, min(start + config.optim.micro_batch, len(batch.rollouts))))
        rollouts = batch.rollouts.select(rows)
        yield MicroBatch(
            rollouts=rollouts,
            advantages=batch.advantages[rows],
            ref_per_token_logps=scores_of(reference, rollouts, config.rollout.temperature),
            old_per_token_logps=scores_of(policy, rollouts, config.rollout.temperature) if scored else None,
            sampling_per_token_logps=rollouts.sampling_logps if corrected else None,
        )


def loss_of(policy: Policy, part: MicroBatch, config: Config, items: float) -> rlvr_ops.LossOutput:
    """This micro-batch's share of the loss of the whole batch, which has `items` tokens or rollouts."""
    rollouts = rlvr_ops.Rollouts(
        part.rollouts.completion_ids,
        part.advantages,
        ref_per_token_logps=part.ref_per_token_logps,
        old_per_token_logps=part.old_per_token_logps,
        sampling_per_token_logps=part.sampling_per_token_logps,
        completion_mask=part.rollouts.completion_mask,
        num_items_in_batch=items,
    )
    head = replace(policy.head, temperature=config.rollout.temperature)
    plan = rlvr_ops.Plan(with_entropy=True, score_inactive=True)  # entropy and KL then are means over every token
    with policy.autocast():
        hidden = hidden_states_of(policy, part.rollouts)
        return rlvr_ops.policy_loss(hidden, head, rollouts, config.objective, plan)


def _log_step(values: dict[str, float], batch: Batch, config: Config, log: RunLog, step: int) -> None:
    log.metrics(step, values)
    log.progress(step, config.run.steps, values)
    if config.run.log_completions:
        log.completions(step, batch)
    if config.run.table_every and (step % config.run.table_every == 0 or step == 1):
        log.table(batch)


def _log_evaluation(found: Evaluation, log: RunLog, step: int) -> None:
    log.evaluation(step, found.to_dict())
    values = found.metrics()
    log.metrics(step, values)
    shown = [f"pass@{k} {v:.3f}" for k, v in ((n[10:], values[n]) for n in values if n[10:].isdigit())]
    log.say(f"held out at step {step}:  " + "  ".join(shown))
    if found.unjudged():
        log.say(f"  {found.unjudged_sentence()}")
