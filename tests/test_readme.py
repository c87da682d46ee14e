import re
import runpy
from pathlib import Path

import pytest
import torch

from rlvr_ops import ace_loss

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "losses_on_cpu.py"
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def test_the_example_of_the_readme_is_the_file_that_is_tested():
    body = EXAMPLE.read_text().split('"""\n', 1)[1].strip()
    assert body in [block.strip() for block in code_blocks(ROOT / "README.md")]


def test_the_example_has_ten_lines_at_most_besides_its_imports():
    lines = [line for line in EXAMPLE.read_text().split('"""\n', 1)[1].splitlines() if line]
    assert len([line for line in lines if not line.startswith(("import", "from"))]) <= 10


def test_the_example_runs_and_reaches_a_gradient(capsys):
    torch.manual_seed(0)
    names = runpy.run_path(str(EXAMPLE))
    assert torch.isfinite(names["hidden"].grad).all()
    assert names["hidden"].grad.abs().sum() > 0
    loss, norm, overconfident = map(float, capsys.readouterr().out.split())
    assert loss == pytest.approx(float(names["out"].loss.detach()))
    assert norm > 0
    assert 0 <= overconfident <= 1


def run_block(with_text: str) -> dict:
    names = {}
    exec(next(block for block in code_blocks(ROOT / "README.md") if with_text in block), names)
    return names


def run_blocks(*texts: str) -> dict:
    """The names after running the first block with each text, one after the other."""
    names: dict = {}
    for text in texts:
        exec(next(block for block in code_blocks(ROOT / "README.md") if text in block), names)
    return names


def test_the_records_of_the_readme_are_ace_dapo():
    names = run_blocks("ace_loss(hidden", "surrogate=surrogate", "Objective(")
    same = ace_loss(
        names["hidden"], names["lm_head"].weight, names["completion_ids"], names["advantages"], **names["given"],
        loss_type="dapo", epsilon_high=0.28,
    )  # fmt: skip
    assert names["out"].loss.item() == same.loss.item()
    assert names["out"].metrics["entropy"].isfinite()


def test_the_head_on_the_page_of_models_is_the_module_that_it_is_made_of():
    names = run_blocks("ace_loss(hidden", "surrogate=surrogate", "Objective(")
    exec(next(block for block in code_blocks(ROOT / "docs" / "models.md") if "Head.of(lm_head)" in block), names)
    given = (names[name] for name in ("completion_ids", "advantages"))
    same = ace_loss(names["hidden"], names["lm_head"].weight, *given, ref_per_token_logps=names["ref"])
    assert names["out"].loss.item() == same.loss.item()


def test_the_readme_loop_makes_right_rollouts_likelier_than_wrong_ones():
    transformers = pytest.importorskip("transformers")
    names = run_block("def training_step")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    input_ids, completion_mask = torch.randint(50, (4, 9)), torch.ones(4, 6)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])

    attention_mask = torch.ones(4, 9, dtype=torch.long)
    before = names["logps"](model, input_ids, attention_mask, 6)
    for _ in range(3):
        names["training_step"](model, optimizer, input_ids, attention_mask, completion_mask, rewards, 4, before, before)
    gain = (names["logps"](model, input_ids, attention_mask, 6) - before).sum(1)
    assert gain[rewards == 1].min() > gain[rewards == 0].max()


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_every_link_between_pages_leads_somewhere(page):
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_names_the_commands_that_users_start_with():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    assert "pytest --benchmark" in text
