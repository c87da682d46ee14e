"""What text may be before Python evaluates it, and what Python may do afterwards.

sympy's parser and several generators of reasoning-gym hand an answer to `eval`. An audit hook sees every text that is about to be
compiled, whoever asks for it, and lets through only numbers, known names, operators, and calls of known functions: no attribute, no
subscript, no import, no lambda. The same hook refuses what no judge needs: processes, sockets, files that are written.
An audit hook cannot be taken away again, and works on every platform; `sandbox` adds what the kernel offers.
"""

import ast
import sys
from typing import Any

MOST_CHARACTERS, MOST_NODES, DEEPEST = 20_000, 5_000, 60
LARGEST_ARGUMENT = 10_000  # of a power or a factorial
NUMBERS = {"Integer", "Float", "Rational", "Symbol", "Function", "Number"}
CONSTANTS = {"pi", "E", "I", "oo", "zoo", "nan", "GoldenRatio", "EulerGamma", "true", "false", "True", "False", "None"}
FUNCTIONS = {
    "sqrt", "cbrt", "root", "exp", "log", "ln", "Abs", "abs", "sign", "Min", "Max", "floor", "ceiling", "re", "im",
    "conjugate",
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "atan2", "asec", "acsc", "acot",
    "sinh", "cosh", "tanh", "sech", "csch", "coth", "asinh", "acosh", "atanh", "factorial", "binomial", "gcd", "lcm",
    "Add", "Mul", "Pow", "Mod", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "erf", "erfc", "gamma",
    "Tuple", "Matrix", "FiniteSet", "Interval",
}  # fmt: skip
NAMES = NUMBERS | CONSTANTS | FUNCTIONS
GROWING = {"factorial", "binomial", "gamma", "Pow"}
NODES = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Compare,
    ast.cmpop, ast.BoolOp, ast.boolop, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.keyword,
)  # fmt: skip
TRUSTED = (  # modules whose code is made of names and counts of their own; sympy's writes products of n generators
    "collections", "dataclasses", "importlib._bootstrap", "importlib._bootstrap_external", "functools", "typing", "enum",
    "sympy.polys.monomials",
)  # fmt: skip
REFUSED = (
    "os.",
    "socket.",
    "subprocess.",
    "shutil.",
    "ctypes.",
    "pty.",
    "webbrowser.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
)
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")
ITS_OWN = "from sympy import *"  # what sympy's parser executes before it reads anything
KEYWORDS = {"evaluate", "real", "integer", "positive"}


class RefusedError(RuntimeError):
    """Text or an action that has no place in an answer."""


def check_expression(source: str) -> None:
    """Refuse text that is anything but an expression of numbers, known names, operators and calls of known functions.

    Raises:
        RefusedError: saying what was found.
    """
    if len(source) > MOST_CHARACTERS:
        raise RefusedError(f"an expression of {len(source)} characters")
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RefusedError(f"no expression: {error}") from None
    check_tree(tree)


def check_tree(tree: ast.AST) -> None:
    """The same of an expression that is parsed already."""
    nodes, depth = _size(tree)
    if nodes > MOST_NODES or depth > DEEPEST:
        raise RefusedError(f"an expression of {nodes} parts, {depth} deep")
    for node in ast.walk(tree):
        _check_node(node)


def _check_node(node: ast.AST) -> None:
    if not isinstance(node, NODES):
        raise RefusedError(f"{type(node).__name__} in an expression")
    if isinstance(node, ast.Name) and node.id not in NAMES and (len(node.id) > 1 or not node.id.isalpha()):
        raise RefusedError(f"the name {node.id!r}")
    if isinstance(node, ast.keyword) and node.arg not in KEYWORDS:
        raise RefusedError(f"the argument {node.arg!r}")
    if isinstance(node, ast.Call):
        called = node.func.func if isinstance(node.func, ast.Call) else node.func  # Function('f')(x)
        if not isinstance(called, ast.Name) or called.id not in NUMBERS | FUNCTIONS:
            raise RefusedError("a call of something else than a known function")
        if called.id in GROWING and any(_is_large(argument) for argument in node.args):
            raise RefusedError(f"{called.id} of a large number")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift) and _is_large(node.right):
        raise RefusedError("a large power")


def _is_large(node: ast.AST) -> bool:
    """Whether `node` holds a large number, or a power or a function that grows."""
    return any(
        isinstance(part, ast.Pow | ast.LShift)
        or (isinstance(part, ast.Name) and part.id in GROWING)
        or (isinstance(part, ast.Constant) and _magnitude(part.value) > LARGEST_ARGUMENT)
        for part in ast.walk(node)
    )


def _magnitude(value: Any) -> float:
    """The size of a number, which sympy's parser may write as text."""
    try:
        return abs(float(value)) if isinstance(value, int | float | str) else 0.0
    except ValueError:
        return 0.0
    except OverflowError:
        return float("inf")


def _size(tree: ast.AST) -> tuple[int, int]:
    """Count of nodes and depth, without recursion."""
    nodes, deepest, level = 0, 0, [tree]
    while level:
        nodes, deepest = nodes + len(level), deepest + 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return nodes, deepest


class Guard:
    """The audit hook of a worker. Nothing opens it again.

    Attributes:
        refused: what was refused last; the worker resets it before each answer.
    """

    def __init__(self) -> None:
        self.refused = ""
        self._busy = False

    def close(self) -> None:
        """From now on every compilation is checked and every action that no judge needs is refused."""
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        try:
            if event == "compile":
                self._on_compile(*arguments)
            elif event == "open":
                _on_open(*arguments)
            elif event.startswith(REFUSED) and event not in HARMLESS:
                raise RefusedError(event)
        except RefusedError as error:
            self.refused = str(error)
            raise

    def _on_compile(self, source: Any, filename: Any) -> None:
        text = source.decode("utf-8", "replace") if isinstance(source, bytes) else source
        if self._busy or text is None or text == ITS_OWN or _asked_by() in TRUSTED:
            return
        self._busy = True
        try:
            if isinstance(text, ast.AST):
                check_tree(text)
            else:
                check_expression(text)
        finally:
            self._busy = False


def _on_open(path: Any, mode: Any, flags: Any) -> None:
    import os

    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    if (isinstance(flags, int) and flags & writes) or (isinstance(mode, str) and set(mode) & set("wax+")):
        raise RefusedError(f"writing to {path!r}")


def _asked_by() -> str:
    """The module whose code asks for the compilation."""
    frame = sys._getframe(3)
    return str(frame.f_globals.get("__name__", "")) if frame else ""
