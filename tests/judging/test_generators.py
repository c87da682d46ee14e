"""Every generator of reasoning-gym: its own answers are right in a worker, and no answer does anything there but be wrong."""

import ast
import inspect
import time

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS
from rlvr_trainer.judging.guard import RefusedError, check_expression
from rlvr_trainer.judging.workers import Workers, generated

GENERATORS = sorted(set(DATASETS) - {"composite"})  # which needs others to compose
EVALUATORS = {
    "eval",
    "exec",
    "compile",
    "parse_expr",
    "sympify",
    "simplify",
    "S",
    "literal_eval",
    "loads",
    "parse_latex",
    "lambdify",
}
SECONDS = 3.0
HOSTILE = {
    "import": "__import__('os').system('touch {file}')",
    "import in a list": "['A', 'B', __import__('os').system('touch {file}')]",
    "import in brackets": "[[1, 2], [__import__('pathlib').Path('{file}').write_text('x')]]",
    "open": "open('{file}', 'w').write('x')",
    "walk": "().__class__.__base__.__subclasses__()[104].load_module('os').system('touch {file}')",
    "attribute of a symbol": "x.__class__.__mro__[-1].__subclasses__()",
    "lambda": "(lambda: open('{file}', 'w'))()",
    "comprehension": "[c for c in ().__class__.__base__.__subclasses__()]",
    "string to sympify": 'sin(\'__import__("os").system("touch {file}")\')',
    "symbol to lambdify": 'Symbol(\'__import__("os").system("touch {file}")\') + 1',
    "format": 'f\'{{open("{file}", "w")}}\'',
    "walrus": "(y := __import__('os'))",
    "tower": "9**9**9**9**9",
    "tower in sympy": "Pow(9, Pow(9, Pow(9, 9)))",
    "factorial": "factorial(factorial(10**6))",
    "shift": "1 << 10**12",
    "parentheses": "(" * 3000 + "1" + ")" * 3000,
    "digits": "9" * 100_000,
    "a long sum": "1+" * 50_000 + "1",
    "a long list": "[" * 500 + "]" * 500,
    "ten megabytes": "7" * 10_000_000,
    "nothing": " ",
    "nul": "1\0+1",
    "surrogate": "\ud800",
}


def evaluates(name):
    """Whether the module of a generator hands text to something that evaluates or parses it."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(DATASETS[name][0])))
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any((f.id if isinstance(f, ast.Name) else getattr(f, "attr", "")) in EVALUATORS for f in called)


PARSING = [name for name in GENERATORS if evaluates(name)]


@pytest.fixture(scope="module")
def workers():
    made = Workers(2, seconds=SECONDS, generators=True)
    made.sealed()
    yield made
    made.close()


def test_the_generators_that_evaluate_are_found():
    assert {
        "countdown",
        "puzzle24",
        "simple_integration",
        "intermediate_integration",
        "polynomial_multiplication",
    } <= set(PARSING)
    assert {"n_queens", "string_insertion", "spiral_matrix", "binary_matrix"} <= set(PARSING)


def test_every_generator_scores_its_own_answers_in_a_worker_as_outside(workers):
    requests, outside = [], []
    for name in GENERATORS:
        data = reasoning_gym.create_dataset(name, seed=1, size=2)
        for entry in data:
            answer = str(entry["answer"])
            requests += generated(name, {}, [(entry, answer)])
            outside.append((name, float(data.score_answer(answer, entry))))
    inside = workers(requests)
    assert [(name, verdict.score) for (name, _), verdict in zip(outside, inside, strict=True)] == outside


@pytest.mark.parametrize("name", PARSING)
def test_no_answer_of_a_generator_that_evaluates_is_refused_unless_it_is_unevaluated(workers, name):
    data = reasoning_gym.create_dataset(name, seed=5, size=8)
    found = workers(generated(name, {}, ((entry, str(entry["answer"])) for entry in data)))
    for entry, verdict in zip(data, found, strict=True):
        copies_the_question = "Integral(" in str(
            entry["answer"]
        )  # which sympy would find equal, and nobody has integrated
        assert (verdict.reason == "refused") == copies_the_question, (entry["answer"], verdict)
        assert verdict.reason in ("right", "refused") or entry["answer"] is None  # where any of many is right


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("countdown", "False*({sum}) + (True+True+True)*{target}"),
        ("countdown", "{target}"),
        ("puzzle24", "ceiling(exp(pi)) + False*({sum})"),
        ("puzzle24", "6*4*1*1"),
        ("countdown", "2**3*3"),
        ("puzzle24", "1.5*2*8"),
        ("puzzle24", "24"),
    ],
)
def test_a_number_that_is_not_made_of_the_given_ones_is_no_answer(workers, name, answer):
    for entry in reasoning_gym.create_dataset(name, seed=3, size=3):
        numbers = entry["metadata"]["numbers"]
        text = answer.format(sum="+".join(map(str, numbers)), target=entry["metadata"].get("target"))
        (verdict,) = workers(generated(name, {}, [(entry, text)]))
        assert verdict.score == 0.0


@pytest.mark.parametrize("name", PARSING)
def test_hostile_answers_do_nothing_and_later_ones_are_judged(workers, name, tmp_path):
    data = reasoning_gym.create_dataset(name, seed=1, size=1)
    entry, file = data[0], tmp_path / "written"
    texts = [text.replace("{file}", str(file)).replace("{{", "{").replace("}}", "}") for text in HOSTILE.values()]
    start = time.perf_counter()
    found = workers(generated(name, {}, ((entry, text) for text in texts)))
    seconds = time.perf_counter() - start
    assert not file.exists()
    limits = sum(verdict.reason in ("time limit", "memory limit", "crashed") for verdict in found)
    assert seconds < (limits + 1) * (SECONDS + 5.0)  # each costs its limit at most, and a worker to replace
    answer = str(entry["answer"])
    assert all(verdict.score < 1.0 for verdict, text in zip(found, texts, strict=True) if text != answer)
    (last,) = workers(generated(name, {}, [(entry, answer)]))
    assert last.score == float(data.score_answer(answer, entry))


@pytest.mark.parametrize("source", [
    "2*x**3 + C", "sin(x)*exp(-x)/2", "Integer (1 )/Integer (2 )*Symbol ('x' )**Integer (3 )", "Function ('f' )(x)", "[1, [2, 3]]",
    "(1 + 2)*3 - 4/5", "['a', 'b']", "factorial(5)", "x**(1/2)", "-(-3)", "1 < 2", "{'a': 1}",
])  # fmt: skip
def test_what_an_answer_may_be(source):
    check_expression(source)


@pytest.mark.parametrize("source", [
    "x.y", "x[0]", "lambda: 1", "__import__('os')", "open('f')", "foo(1)", "[i for i in (1,)]", "(yield)", "a := 1", "f'{x}'",
    "1 if x else 2", "9**9**9", "9**100000", "factorial(10**9)", "factorial(factorial(9))", "1 << 99999", "import os", "x = 1", "",
    "print(1)", "getattr(x, 'y')", "sin(**{'x': 1})", "exec('1')", "await x", "(" * 3000 + ")" * 3000, "*x", "type(x)",
    "f(x)(y)(z)", "global x",
])  # fmt: skip
def test_what_no_answer_may_be(source):
    with pytest.raises(RefusedError):
        check_expression(source)
