"""Workers: a hung answer costs its limit and nobody else's time, a dead one is replaced, and what they say is not trusted."""

import os
import signal
import sys
import threading
import time

import pytest
from rlvr_trainer.judging import BadReferenceError, WorkerError, judge, worker
from rlvr_trainer.judging.verdict import COUNTED, CRASHED, MEMORY, TIME, TOO_LONG, Verdict, counts
from rlvr_trainer.judging.workers import Worker, Workers, _verdict, answers

HANGS = r"\boxed{\int_0^1 e^{-x^2}\sin(x^3)dx}"  # which sympy integrates for a long time


@pytest.fixture(scope="module")
def two():
    made = Workers(2, seconds=2.0)
    made.sealed()
    yield made
    made.close()


def test_verdicts_come_in_the_order_of_the_answers(two):
    found = two(answers([([str(i)], str(i - i % 3)) for i in range(60)]))
    assert [verdict.score for verdict in found] == [float(i % 3 == 0) for i in range(60)]


def test_equal_answers_are_judged_once(two, monkeypatch):
    asked, own = [], Worker.ask
    monkeypatch.setattr(Worker, "ask", lambda worker, request: (asked.append(1), own(worker, request))[1])
    found = two(answers([(["7"], "7"), (["7"], "8"), (["7"], "7"), (["8"], "8")]))
    assert [verdict.score for verdict in found] == [1.0, 0.0, 1.0, 1.0]
    assert len(asked) == 3


def test_a_hung_answer_costs_its_limit_and_delays_nobody(two):
    start = time.perf_counter()
    finished = []
    own = two._ask
    two._ask = lambda request: (own(request), finished.append(time.perf_counter() - start))[0]
    try:
        found = two(answers([(["x+1"], HANGS), *[([str(i)], str(i)) for i in range(50)]]))
    finally:
        del two._ask
    assert found[0] == Verdict(0.0, TIME, "x+1") or found[0].reason in (MEMORY, CRASHED)
    assert all(verdict.score == 1.0 for verdict in found[1:])
    assert sorted(finished)[49] < 2.0  # the fifty others were judged while the first one hung
    assert finished[-1] < 2.0 + 5.0
    assert two(answers([([n], n) for n in "7654"])) == [
        Verdict(1.0, "right", n, n) for n in "7654"
    ]  # by a worker that replaced the hung one


def test_an_answer_at_which_the_worker_dies_is_wrong_and_the_next_is_judged(two):
    worker = two._all[0]
    worker._start()
    threading.Timer(0.3, lambda: os.kill(worker._process.pid, signal.SIGKILL)).start()
    reply, late = worker.ask(
        {"references": ["x+1"], "completion": HANGS, "extract": "whole", "accept_unevaluated": False}
    )
    assert (reply, late) == (None, False)
    assert two(answers([([n], n) for n in "765"])) == [Verdict(1.0, "right", n, n) for n in "765"]


def test_a_worker_that_dies_for_another_reason_costs_no_answer(two, monkeypatch):
    own, dead = Worker.ask, iter([(None, False)])
    monkeypatch.setattr(Worker, "ask", lambda worker, request: next(dead, None) or own(worker, request))
    assert two(answers([([n], n) for n in "765"])) == [Verdict(1.0, "right", n, n) for n in "765"]


def test_a_worker_lives_on_beside_a_trainer_that_holds_much_memory():
    held = bytearray(3 * 2**30)
    held[:: 2**12] = b"x" * len(held[:: 2**12])  # every page
    one = Workers(1)
    try:
        one(answers([(["7"], "7")]))
        first = one._all[0]._process.pid
        one(answers([(["7"], "7")] * 5))
        assert one._all[0]._process.pid == first
    finally:
        one.close()
        del held


def test_what_answers_leave_in_memory_does_not_stay():
    one = Workers(1)
    try:
        large = [(["7"], rf"\boxed{{2^{{{99_000 + i}}}}}") for i in range(20)]
        huge = [(["7"], rf"\boxed{{2^{{{400_000_000 + i}}}}}") for i in range(20)]
        assert {verdict.score for verdict in one(answers([*large, *huge]))} == {0.0}
        with open(f"/proc/{one._all[0]._process.pid}/statm") as file:
            assert int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") < 2**30
        assert one(answers([(["7"], "7")]))[0].score == 1.0
    finally:
        one.close()


def test_closing_waits_for_no_answer():
    hung = Workers(1, seconds=60.0)
    hung.sealed()
    thread = threading.Thread(target=lambda: hung(answers([(["x+1"], HANGS)])))
    thread.start()
    time.sleep(0.3)
    start = time.perf_counter()
    hung.close()
    thread.join()
    assert time.perf_counter() - start < 5.0


def test_ten_megabytes_are_refused_before_they_are_sent(two):
    assert two(answers([(["7"], "7" * 10_000_000)])) == [Verdict(0.0, TOO_LONG)]


def test_no_answers_start_no_process():
    idle = Workers()
    assert idle([]) == []
    assert idle._pool is None


def test_an_installation_without_a_judge_is_an_error_and_not_a_wrong_answer(monkeypatch):
    broken = Workers(1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match="no judge could be started: run /bin/false"):
        broken(answers([(["7"], "7")]))
    broken.close()


@pytest.mark.parametrize("score", [2, -1, float("nan"), "1", [1], True + 1])
def test_a_reply_is_believed_only_as_far_as_its_types_go(score):
    assert _verdict({"score": score, "reason": "right"}).reason == CRASHED


def test_reasons_are_counted_by_name():
    found = counts([Verdict(0.0, TIME), Verdict(0.0, TIME), Verdict(1.0, "right")])
    assert found["judge/time_limit"] == 2.0
    assert len(found) == len(COUNTED)
    assert sum(found.values()) == 2.0


def test_the_public_judge():
    assert judge("1/2", "So the answer is $0.5$.") == Verdict(1.0, "right", "1/2", "0.5")
    assert judge(["7", "8"], "8").score == 1.0
    assert judge("7", "3+4", accept_unevaluated=True).score == 1.0
    assert judge("7", "3 + 4 is 7 !", extract="last_number").score == 1.0
    with pytest.raises(BadReferenceError, match="reference cannot be read: '': it is empty"):
        judge("", "2")
    with pytest.raises(BadReferenceError, match="reference holds no answer"):
        judge([], "2")
    with pytest.raises(TypeError, match="reference must be text or a list of texts, got 12"):
        judge(12, "12")
    with pytest.raises(TypeError, match="completion must be text, got None"):
        judge("12", None)
    with pytest.raises(ValueError, match="extract must be 'whole' or 'last_number', got 'last'"):
        judge("12", "12", extract="last")


@pytest.mark.parametrize(("raised", "said"), [(MemoryError(), "memory limit"), (KeyError("x"), "KeyError: 'x'")])
def test_a_failure_of_the_judge_is_wrong_for_an_answer_and_bad_for_a_reference(monkeypatch, raised, said):
    monkeypatch.setattr(worker, "answer", lambda _: (_ for _ in ()).throw(raised))
    assert worker._answer({"references": ["7"], "completion": "7"}).score == 0.0
    verdict = worker._answer({"references": ["7"]})
    assert (verdict.score, verdict.read_reference) == (None, f"'7': {said}")
