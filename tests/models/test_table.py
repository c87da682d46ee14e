"""Every family on docs/models.md is what the page says."""

import re

import pytest

from tools import model_table

PAGE = model_table.PAGE.read_text().split(model_table.BEGIN)[1].split(model_table.END)[0]
ROWS = re.findall(r"^\| (.+?) \| \d+ \| (.+?) \|$", PAGE, re.MULTILINE)
SAID = {family: kind for kind, row in ROWS for family in row.split(", ") if not kind.startswith("not asked")}
HERE = [family for family in SAID if family in model_table.families()]  # an older transformers has fewer
NAMED = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "mixtral",
    "phi",
    "phi3",
    "granite",
    "cohere",
    "olmo",
    "olmo2",
    "smollm3",
    "gpt2",
    "deepseek_v2",
    "deepseek_v3",
    "glm",
    "glm4",
    "gpt_oss",
]


@pytest.mark.parametrize("family", HERE)
def test_a_familys_head_is_what_the_page_says(family):
    model = model_table.build(family)
    assert not isinstance(model, str), model
    found = model_table.ask(family, model)
    assert SAID[family] == (f"exact, {found.head}" if found.head else found.refusal)


def test_the_families_that_people_train_are_exact():
    assert [family for family in NAMED if not SAID.get(family, "").startswith("exact")] == []


def test_the_table_groups_families_by_what_was_found():
    found = [model_table.Found("b", "plain", ""), model_table.Found("a", "plain", ""), model_table.Found("c", "", "no")]
    rows = model_table.table(found).splitlines()[2:]
    assert rows == ["| exact, plain | 2 | b, a |", "| no | 1 | c |"]
