"""docs/methods.md, held against the code: every name is there, every call exists, and what a row equates is equal."""

import ast
import inspect
import re
import runpy
import typing
from pathlib import Path

import pytest
import torch
from rlvr_trainer.algorithm import PRESETS, AlgorithmConfig
from rlvr_trainer.config import load

import rlvr_ops
from rlvr_ops import ACELoss, ace_loss, ace_loss_from_logps, advantages, calibration, evaluation, rewards, surrogates
from rlvr_ops.objectives.objective import AGGREGATIONS, VERL_NAMES, Objective

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text()
EXAMPLE = ROOT / "examples" / "losses.py"
WITHOUT_BLOCKS = re.sub(r"```.*?```", "", PAGE, flags=re.S)
CODE = re.findall(r"`([^`]+)`", WITHOUT_BLOCKS)
FREE = {"fn": lambda logps, rows: -rows.advantages * logps}  # what the page leaves to the reader
LOSS = {name for name in rlvr_ops.__all__ if name.endswith(("_loss", "_loss_from_logps"))}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its two header lines."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = re.findall(r"(?:^\|.*\|\n)+", section, flags=re.M)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def keywords(text: str) -> dict:
    call = ast.parse(f"f({text})", mode="eval").body
    return {k.arg: eval(ast.unparse(k.value), vars(rlvr_ops) | FREE) for k in call.keywords}


def calls() -> list[ast.Call]:
    found = []
    for text in dict.fromkeys(CODE):
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError:
            continue
        found += [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and not ast.unparse(node.func).endswith(").exp")
        ]
    return found


CALLS = calls()
SURROGATES, REFUSED = rows("Surrogates"), rows("What does not go together")
COMPOSED = [[method, "", *others] for method, *others in rows("What composes with them")]  # they have no presets


def batch() -> dict:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16), torch.randn(30, 16)
    ids = torch.randint(30, (4, 6))
    old, ref = (rlvr_ops.token_logps(hidden + s * torch.randn(4, 6, 16), weight, ids).logps for s in (0.2, 0.3))
    return {
        "hidden_states": hidden.requires_grad_(),
        "lm_head_weight": weight,
        "completion_ids": ids,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "completion_mask": torch.arange(6) < torch.tensor([[6], [3], [5], [4]]),
    }


def loss_of(function, **given) -> list[float]:
    data = batch()
    if "sampling_correction" in given:
        given["sampling_per_token_logps"] = data["old_per_token_logps"] - 0.1
    out = function(**data, **given)
    out.loss.backward()
    return [out.loss.item(), data["hidden_states"].grad.norm().item()]


def plain(*args, **given):
    """`ace_loss` without ACE, unless alpha is given."""
    return ace_loss(*args, **{"alpha": 0.0, **given})


def objective_of(given: dict) -> Objective:
    return ACELoss(**{"alpha": 0.0, **given}).objective


def run_block(with_text: str) -> tuple[str, dict, dict]:
    """A block of the page, its names after running behind the example's, and the example's."""
    block = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S) if with_text in block)
    example = runpy.run_path(str(EXAMPLE))
    names = {name: example[name] for name in ("hidden", "completion_ids", "advantages", "old", "ref")}
    names["lm_head"] = torch.nn.Linear(example["H"], example["V"], bias=False)
    exec(block, names)
    return block, names, example


@pytest.mark.parametrize("name", surrogates.SURROGATES)
def test_every_surrogate_is_on_the_page_by_name_and_with_its_numbers(name):
    record = surrogates.SURROGATES[name]
    assert f"\n| `{name}` | `{record.__name__}(" in PAGE
    text = next(text for text in CODE if text.startswith(f"{record.__name__}("))
    given = ast.parse(text, mode="eval").body.keywords
    defaults = {name: p.default for name, p in inspect.signature(record).parameters.items()}
    assert {keyword.arg: ast.literal_eval(keyword.value) for keyword in given} == defaults
    assert name in {keywords(code(row[2])[0]).get("surrogate", "ppo_clip") for row in SURROGATES}


@pytest.mark.parametrize("name", sorted(LOSS))
def test_every_named_loss_is_on_the_page(name):
    assert name.removesuffix("_from_logps") in CODE or any(text.startswith(f"{name}(") for text in CODE)


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_every_estimator_of_advantages_is_on_the_page(name):
    assert any(text.startswith(f'group_advantages(rewards, G, "{name}"') for text in CODE)


@pytest.mark.parametrize(
    "name",
    [
        name
        for module in (rewards, calibration, evaluation, advantages)
        for name in module.__all__
        if name.islower() and name != "group_advantages"
    ]
    + ["ace_advantages"],
)
def test_every_function_around_the_losses_is_on_the_page(name):
    assert any(isinstance(call.func, ast.Name) and call.func.id == name for call in CALLS)


def test_every_public_name_of_the_library_is_on_the_page_or_a_result_or_about_where_it_runs():
    elsewhere = {
        "LossOutput",
        "TokenScores",
        "BordaVote",
        "PPOCRewards",
        "ReliabilityBins",
        "explain_backend",
        "cuda_graph_warmup",
        "hidden_states_of",  # docs/models.md
    }
    words = set(re.findall(r"\w+", PAGE))
    missing = {name for name in rlvr_ops.__all__ if name.removesuffix("_from_logps") not in words} - elsewhere
    assert not missing


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("ace-")])
def test_every_preset_of_the_trainer_is_on_the_page(name):
    assert [name] in [code(row[3]) for row in SURROGATES]


def test_every_aggregation_is_on_the_page_with_verls_name_for_it():
    found = {code(row[0])[0]: code(row[1]) for row in rows("From tokens to one number")}
    assert set(found) == set(AGGREGATIONS)
    assert {verl[0]: ours for ours, verl in found.items() if verl} == VERL_NAMES


def test_the_estimators_that_the_page_gives_to_the_trainer_are_those_it_takes():
    taken = {
        keyword.value
        for row in rows("Advantages")
        if row[-1] == "yes"
        for keyword in ast.parse(code(row[1])[0], mode="eval").body.args
        if isinstance(keyword, ast.Constant)
    }
    assert taken == set(typing.get_args(typing.get_type_hints(AlgorithmConfig)["advantages"]))


@pytest.mark.parametrize("row", rows("Advantages"), ids=lambda row: row[0])
def test_the_estimators_that_need_verdicts_are_those_the_page_says(row):
    call = ast.parse(code(row[1])[0], mode="eval").body
    if call.func.id == "group_advantages":
        assert advantages.estimators.ESTIMATORS[call.args[2].value].binary == (row[-2] == "0/1")


@pytest.mark.parametrize("call", CALLS, ids=ast.unparse)
def test_every_call_on_the_page_exists_and_takes_what_it_is_given(call):
    text = ast.unparse(call.func)
    name = text.removeprefix("rows.")
    method = name != text or name.startswith("rollout_")
    target = rlvr_ops.SurrogateRows if method else rlvr_ops
    for part in name.split("."):
        target = getattr(target, part)
    given = [None] * (len(call.args) + method)  # self
    inspect.signature(target).bind_partial(*given, **{keyword.arg: None for keyword in call.keywords})


def test_every_module_that_the_page_names_exists():
    for name in re.findall(r"rlvr_ops\.(\w+)", WITHOUT_BLOCKS):
        assert hasattr(rlvr_ops, name)


@pytest.mark.parametrize("row", [row for row in SURROGATES if code(row[1])], ids=lambda row: row[0])
def test_a_named_loss_is_ace_loss_with_the_keywords_of_its_row(row):
    named = getattr(rlvr_ops, code(row[1])[0])
    assert loss_of(named) == loss_of(plain, **keywords(code(row[2])[0]))


@pytest.mark.parametrize("row", SURROGATES + COMPOSED, ids=lambda row: row[0])
def test_the_keywords_of_a_row_run_and_reach_a_gradient(row):
    for text in code(row[2]):
        assert loss_of(plain, **keywords(text))[1] > 0


@pytest.mark.parametrize(
    "row", [row for row in SURROGATES + COMPOSED if code(row[3]) and ":function" not in row[3]], ids=lambda row: row[0]
)
def test_the_trainer_computes_the_loss_of_the_row(row):
    given = keywords(code(row[2])[0])
    text = code(row[3])[0]
    overrides = (
        [f"algorithm.name={text}"] if text in PRESETS else ["algorithm.name=sapo", "algorithm.surrogate=ppo_clip"]
    )
    if text not in PRESETS:
        overrides += text.split()
    algorithm = load(None, overrides).algorithm
    policy = {**algorithm.policy(), "sampling_correction": algorithm.correction(off_policy_sampler=False)}
    if "beta" not in given:
        policy["beta"] = 0.0  # of the presets grpo and ace-grpo, whose objectives have a KL term
    assert objective_of(policy) == objective_of(given)
    assert objective_of(policy).aggregation == given.get("loss_type", "grpo")


@pytest.mark.parametrize("row", SURROGATES + COMPOSED, ids=lambda row: row[0])
def test_what_a_row_costs_is_what_the_head_does(row):
    objective = objective_of(keywords(code(row[2])[0]))
    two = objective.entropy.top_quantile < 1 or getattr(objective.surrogate, "whole_batch", False)
    local = objective.is_token_local(has_old=True) and not two
    assert row[-1] == ("two passes" if two else "any chunk" if local else "whole rollouts")


@pytest.mark.parametrize(
    ("cost", "room", "passes"), [("any chunk", 4, 1), ("whole rollouts", 4, 2), ("whole rollouts", 6, 1)]
)
def test_the_costs_are_what_auto_takes(cost, room, passes):
    """The longest rollout has 6 tokens."""
    for row in SURROGATES + COMPOSED:
        if row[-1] == cost:
            given, data = keywords(code(row[2])[0]), batch()
            if "sampling_correction" in given:
                given["sampling_per_token_logps"] = data["old_per_token_logps"]
            out = plain(**data, **given, workspace_bytes=room * 30 * 4)
            assert out.metrics["head/single_pass"].item() == (passes == 1), row[0]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_what_the_page_says_is_refused_is(row):
    with pytest.raises(ValueError, match=r"\w+ .{20}"):
        loss_of(plain, **keywords(code(row[0])[0]))


@pytest.mark.parametrize("name", surrogates.SURROGATES)
def test_on_policy_every_surrogate_has_the_derivative_that_the_page_says(name):
    logp, given = torch.full((3, 4), -1.0, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    for old in (None, logp.detach()):
        out = ace_loss_from_logps(
            logp, given, surrogate=name, alpha=0.0, old_per_token_logps=old, loss_type="luspo", num_items_in_batch=1
        )
        (slope,) = torch.autograd.grad(out.loss, logp)
        torch.testing.assert_close(slope, -given[:, None].expand(3, 4), rtol=1e-6, atol=0)


def test_every_paper_on_the_page_has_its_address():
    addresses = dict(re.findall(r"^\[(\d{4}\.\d{5})\]: https://arxiv\.org/abs/(\d{4}\.\d{5})$", PAGE, flags=re.M))
    assert all(number == address for number, address in addresses.items())
    assert set(re.findall(r"\[(\d{4}\.\d{5})\](?!:)", PAGE)) == set(addresses)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_every_link_to_a_section_finds_its_heading(page):
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    assert [link for link in links if link[1] not in anchors(page.parent / link[0] if link[0] else page)] == []


def test_every_metric_of_a_loss_is_explained():
    given = {"sampling_correction": "token_mask", "off_policy_mask_threshold": 0.1, "with_entropy": True, "alpha": 1.0}
    data = batch()
    out = ace_loss(**data, **given, sampling_per_token_logps=data["old_per_token_logps"])
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for name in out.metrics if f"`{name}`" not in page] == []


def test_the_five_lines_of_the_page_are_those_of_the_example_and_run():
    block, names, example = run_block("def quadratic")
    assert torch.isfinite(names["out"].loss)
    lines = [line for line in inspect.getsource(example["quadratic"]).splitlines() if '"""' not in line]
    assert len(lines) <= 5
    assert [line.strip() for line in lines[1:]] == [
        line.strip() for line in block.split("def quadratic", 1)[1].split("\n\n")[0].splitlines()[1:]
    ]


def test_the_records_of_the_page_are_the_loss_of_its_keywords():
    _, names, _ = run_block("Objective(")
    weight = names["lm_head"].weight
    given = {"ref_per_token_logps": names["ref"], "old_per_token_logps": names["old"], "schedule": "two_pass"}
    same = ace_loss(
        names["hidden"], weight, names["completion_ids"], names["advantages"], **given,
        alpha=1.0, beta=0.001, epsilon_high=0.28, loss_type="dapo",
    )  # fmt: skip
    assert names["out"].loss.item() == same.loss.item()


def test_every_keyword_of_ace_loss_is_in_the_table_of_records():
    held = {name for row in rows("The same as records") for cell in row for name in re.findall(r"\w+", cell)}
    assert not set(inspect.signature(ace_loss).parameters) - held - {"hidden_states"}


def test_the_losses_of_the_readme_run_after_its_ten_lines(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    names: dict = {}
    for with_text in ("ace_loss(hidden", "surrogate=surrogate"):
        exec(next(block for block in blocks if with_text in block), names)
    *_, cispo, sapo, quadratic = map(float, capsys.readouterr().out.split())
    assert len({cispo, sapo, quadratic}) == 3


def test_the_example_prints_every_surrogate_and_every_preset_with_and_without_ace(capsys):
    names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    known = {name.removesuffix("_loss") for name in LOSS if name.endswith("_loss")} - {
        "ace",
        "policy",
        "tokenised_brier",
    }
    assert known <= set(names["LOSSES"])
    used = {settings.get("surrogate", "ppo_clip") for settings in names["LOSSES"].values()}
    assert set(surrogates.SURROGATES) <= used
    rows, note = printed.split("\n\n")
    assert rows.count("\n") == len(names["table"]) == 2 * len(names["LOSSES"])
    assert "cannot be compared" in note
    for name in names["LOSSES"]:
        (loss, norm, clipped, _), (weighted, weighted_norm, _, passes) = (names["table"][name, a] for a in (0.0, 1.0))
        assert loss != weighted
        assert weighted_norm > norm > 0
        assert 0 <= clipped <= 1
        assert passes == 2  # ACE needs whole rollouts, and the workspace has no room for the longest


def test_the_example_gives_the_same_numbers_every_time():
    first, second = (runpy.run_path(str(EXAMPLE))["table"] for _ in range(2))
    assert first == second
