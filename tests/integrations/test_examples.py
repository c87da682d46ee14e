"""The examples for one's own loop are short, listed in the README, right in their sums, and learn."""

import contextlib
import copy
import csv
import functools
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad
from torch.optim.optimizer import register_optimizer_step_pre_hook

import rlvr_ops
from rlvr_ops import Head, dapo_loss, hidden_states_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TRAINERS = ["accelerate_loop", "transformers_trainer", "lightning_module"]
SETTINGS = "= 30, 8, 8, 16, 1.0"  # of plain_pytorch.py: steps, prompts, group, rollouts of a micro-batch, alpha


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch, tmp_path):
    """Examples import policy.py from their own folder and write into the current one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["example"])
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("policy", None)


def run(name, edits=()):
    """The names of an example and what it printed."""
    text = (EXAMPLES / f"{name}.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, name, "exec"), names)
    return names, printed.getvalue()


@pytest.mark.parametrize("name", ["plain_pytorch", "policy", *TRAINERS])
def test_an_example_has_forty_lines_at_most(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", ["plain_pytorch", "policy", *TRAINERS])
def test_the_readme_links_an_example(name):
    assert f"(examples/{name}.py)" in (ROOT / "README.md").read_text()


def learns(rewards):
    assert len(rewards) == 30
    assert sum(rewards[:5]) / 5 < 0.5
    assert sum(rewards[-5:]) / 5 > 0.8


def weighs(means):
    """Every mean weight is above 1; a batch without a wrong answer, among the last, has none."""
    assert all(mean > 1 or math.isnan(mean) for mean in means)
    assert means[0] == pytest.approx(1 + math.log(2), abs=1e-4)  # the policy is its reference still


def printed_numbers(name, printed):
    return [float(number) for number in re.findall(rf"{name} (-?[\d.]+)", printed)]


def test_the_plain_loop_learns():
    _, printed = run("plain_pytorch")
    assert printed.startswith("step 0 loss ")
    learns(printed_numbers("reward", printed))


def test_the_accelerate_loop_learns_and_logs_by_the_accelerator(monkeypatch):
    from accelerate import Accelerator

    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    _, printed = run("accelerate_loop")
    learns([row["reward"] for row in logged])
    weighs([row["ace/weight/mean"] for row in logged])
    assert printed_numbers("loss", printed) == pytest.approx([row["loss"] for row in logged], abs=6e-4)


def test_the_transformers_trainer_learns_and_logs_in_its_history():
    names, _ = run("transformers_trainer")
    rows = [row for row in names["trainer"].state.log_history if "loss" in row]
    learns([row["reward"] for row in rows])
    weighs([row["ace/weight/mean"] for row in rows])


def test_the_lightning_module_learns_and_logs_by_the_logger():
    _, printed = run("lightning_module")
    with next(Path("runs").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    learns([float(row["reward"]) for row in rows])
    weighs([float(row["ace/weight/mean"]) for row in rows])
    assert printed_numbers("loss", printed) == pytest.approx([float(row["loss"]) for row in rows], abs=6e-4)


def test_the_plain_loop_with_alpha_0_is_dapo(monkeypatch):
    with_ace, _ = run("plain_pytorch", [(SETTINGS, "= 3, 8, 8, 16, 1.0")])
    ours, _ = run("plain_pytorch", [(SETTINGS, "= 3, 8, 8, 16, 0.0")])
    monkeypatch.setattr(rlvr_ops, "ace_loss", lambda *given, alpha, loss_type, **named: dapo_loss(*given, **named))
    theirs, _ = run("plain_pytorch", [(SETTINGS, "= 3, 8, 8, 16, 0.0")])
    weights = [names["model"].lm_head.weight for names in (ours, theirs, with_ace)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_micro_batches_of_the_plain_loop_add_up_to_the_batch():
    taken = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: taken.append([weight.grad.clone() for weight in optimizer.param_groups[0]["params"]])
    )
    for micro_batch in (16, 64):
        run("plain_pytorch", [(SETTINGS, f"= 1, 8, 8, {micro_batch}, 1.0")])
    hook.remove()
    torch.testing.assert_close(*taken, rtol=1e-5, atol=1e-7)


def test_the_policy_with_alpha_0_is_dapo():
    from policy import Policy

    policy = Policy(alpha=0.0)
    torch.nn.init.normal_(policy.reference.lm_head.weight, std=0.1)
    batch = policy.sample(torch.randint(1, 10, (8, 2)))
    ours = policy(**batch)["loss"]
    labels, named = batch["labels"], {name: batch[name] for name in ("old_per_token_logps", "ref_per_token_logps")}
    hidden, head = (
        hidden_states_of(policy.model, batch["input_ids"], length=labels.shape[1]),
        Head.from_model(policy.model),
    )
    theirs = dapo_loss(hidden, head, labels, batch["advantages"], completion_mask=labels != -100, **named)
    assert torch.equal(ours, theirs.loss)
    policy.alpha = 1.0
    assert policy(**batch)["loss"] > ours


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("layers", [False, True], ids=["root", "layers-and-root"])
def test_the_policy_sharded_by_fsdp_has_the_plain_policys_gradient(layers, mesh):
    """What is sharded beside the root must leave the lm_head in the root's group, as the README says."""
    from policy import Policy

    plain = Policy()
    batch, sharded = plain.sample(torch.randint(1, 10, (8, 2))), copy.deepcopy(plain)
    for layer in sharded.model.model.layers if layers else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for policy in (plain, sharded):
        policy(**batch)["loss"].backward()
    for name, weight in sharded.model.named_parameters():
        torch.testing.assert_close(weight.grad.full_tensor(), plain.model.get_parameter(name).grad)


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory):
    """What the policy of each example was given before the first step of the optimizer, by how many processes there are."""

    @functools.cache
    def launch(processes):
        folder = tmp_path_factory.mktemp("first-steps")
        distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        script = [str(Path(__file__).with_name("first_steps.py")), str(folder)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
        command = [sys.executable, *(distributed if processes > 1 else []), *script]
        subprocess.run(command, check=True, cwd=folder, env=environment, timeout=250)
        return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(processes)] for name in TRAINERS}

    return launch


def joined(batches):
    """One batch of several, padded on the right."""
    batch = {}
    for name in batches[0]:
        tensors = [each[name] for each in batches]
        width = max(tensor.shape[-1] for tensor in tensors)
        if tensors[0].ndim == 2:
            tensors = [
                pad(tensor, (0, width - tensor.shape[1]), value=-100 if name == "labels" else 0) for tensor in tensors
            ]
        batch[name] = torch.cat(tensors)
    return batch


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_gradients_of_micro_batches_and_processes_add_up_to_the_batchs(name, processes, first_steps):
    from policy import Policy

    seen = first_steps(processes)[name]
    batches = [dict(batch) for process in seen for batch in process["batches"]]  # other tests read them too
    counts = {int(batch.pop("num_items_in_batch")) for batch in batches}
    batch, policy = joined(batches), Policy()
    policy.load_state_dict(seen[0]["weights"])
    policy(**batch)["loss"].backward()
    expected = {key: weight.grad for key, weight in policy.named_parameters() if weight.grad is not None}
    assert len(batches) >= 4
    assert counts == {int((batch["labels"] != -100).sum())}
    for process in seen:
        torch.testing.assert_close(process["gradients"], expected, rtol=1e-5, atol=1e-7)


def test_two_processes_of_the_accelerate_loop_sample_and_learn_what_one_does(first_steps):
    (alone,), pair = first_steps(1)["accelerate_loop"], first_steps(2)["accelerate_loop"]
    shared = [batch for turn in zip(*(process["batches"] for process in pair), strict=True) for batch in turn]
    torch.testing.assert_close(shared, alone["batches"], rtol=0, atol=0)
    torch.testing.assert_close(pair[0]["gradients"], alone["gradients"], rtol=1e-5, atol=1e-7)


def test_the_accelerate_loop_logs_where_processes_have_unequal_micro_batches(tmp_path):
    text = (EXAMPLES / "accelerate_loop.py").read_text()
    assert text.count("= 30, 4, 2") == 1
    (tmp_path / "loop.py").write_text(text.replace("= 30, 4, 2", "= 1, 4, 2"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "loop.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(printed_numbers("reward", done.stdout)) == 1
