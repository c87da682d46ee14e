"""The final answer of a worked solution, where its data set puts it."""


def after_hashes(text: str) -> str:
    """GSM8K's answer.

    >>> after_hashes("3 + 4 = <<3+4=7>>7 #### 7")
    '7'
    """
    _, hashes, answer = text.rpartition("####")
    if not hashes:
        raise ValueError(
            "no '####' before the answer; task.columns={prompt: ..., answer: ...} without a format takes answers as they stand"
        )
    return answer.strip()


def last_box(text: str) -> str:
    r"""What the last `\boxed{...}` with balanced braces holds.

    >>> last_box(r"\boxed{1}, no, \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed")
    while start >= 0:
        inside = _braced(text, start + len("\\boxed"))
        if inside is not None:
            return inside.strip()
        start = text.rfind("\\boxed", 0, start)
    raise ValueError("no \\boxed{} with balanced braces")


def _braced(text: str, position: int) -> str | None:
    r"""What stands between the brace at `position` and its partner; `\{` and `\}` are no braces."""
    while text[position : position + 1].isspace():
        position += 1
    if not text.startswith("{", position):
        return None
    depth, i = 0, position
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[position + 1 : i]
        i += 1
    return None
