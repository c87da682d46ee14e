import re
import runpy
from pathlib import Path

import pytest
import torch

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
    assert loss == pytest.approx(float(names["out"].loss))
    assert norm > 0
    assert 0 <= overconfident <= 1


def test_a_plain_loop_from_the_readme_lowers_its_loss():
    block = next(block for block in code_blocks(ROOT / "README.md") if "def training_step" in block)
    names = {}
    exec(block, names)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, 16))
    hidden = torch.nn.Parameter(torch.randn(4, 6, 16))
    optimizer = torch.optim.SGD([weight, hidden], lr=0.5)
    ids, mask = torch.randint(50, (4, 6)), torch.ones(4, 6)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    with torch.no_grad():
        old = names["token_logps"](hidden, weight, ids).logps
    losses = [float(names["training_step"](optimizer, hidden, weight, ids, mask, rewards, old, old)) for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_every_link_between_pages_leads_somewhere(page):
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_names_the_commands_that_users_start_with():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    assert "pytest --benchmark" in text


def test_the_benchmark_page_holds_the_stored_results_and_no_others():
    from benchmarks.chart import RESULTS, load, tables

    page = (ROOT / "docs" / "benchmarks.md").read_text()
    stored = load(sorted(RESULTS.iterdir())[0])
    assert tables(stored) in page
