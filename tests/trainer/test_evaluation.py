"""Pass@k and calibration on held-out problems, and what may be said about a difference."""

import json

import pytest
import torch
from rlvr_trainer import loop, report, scoring
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.evaluation import Evaluation, compare, evaluate, powers_of_two
from rlvr_trainer.rollouts import sample
from rlvr_trainer.scoring import confidences_of


def counts(*correct, samples=4):
    return Evaluation(samples=samples, correct=list(correct), reasons={}, mean_length=3.0)


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_k_doubles_up_to_the_number_of_samples(n, ks):
    assert powers_of_two(n) == ks


def test_pass_at_k_is_the_unbiased_estimate():
    values = counts(2, 0).metrics()
    # 1 - C(2, k) / C(4, k) for the first problem: 1/2, 5/6, 1; nothing for the second.
    assert [values[f"eval/pass@{k}"] for k in (1, 2, 4)] == pytest.approx([1 / 4, 5 / 12, 1 / 2])
    assert (values["eval/pass@1/low"], values["eval/pass@1/high"]) == (0.0, 0.5)


def test_a_problem_that_cannot_be_judged_is_neither_solved_nor_missed(untrained, small, digits):
    found = evaluate(untrained, digits(broken=("held out 1",)), small())
    assert found.correct[1] is None
    assert found.unjudged() == 1
    assert len(found.per_problem(1)) == 3
    assert counts(4, None).metrics()["eval/pass@1"] == 1.0
    assert "eval/pass@1" not in counts(None).metrics()


def test_evaluation_repeats_itself_and_leaves_the_random_state_of_training_alone(untrained, small, digits):
    state = torch.get_rng_state()
    first, second = (evaluate(untrained, digits(), small()) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_a_difference_is_called_an_improvement_only_outside_its_interval():
    better = compare(counts(*[0] * 20), counts(*[2] * 20))
    assert better["improved"]
    assert (better["difference_low"], better["difference_high"]) == (0.5, 0.5)
    assert "rose from 0.000 to 0.500: +0.500, 95 % interval [+0.500, +0.500]" in better["sentence"]
    noise = compare(counts(0, 4, 2, 2), counts(4, 0, 2, 3))
    assert not noise["improved"]
    assert noise["sentence"].endswith("no difference that these problems can show.")
    worse = compare(counts(*[2] * 20), counts(*[0] * 20))
    assert not worse["improved"]
    assert "fell" in worse["sentence"]
    assert worse["sentence"].endswith("a loss.")


def test_only_problems_judged_both_times_are_compared():
    assert "over 1 problems" in compare(counts(0, None, 1), counts(4, 4, None))["sentence"]


def test_without_a_problem_judged_both_times_nothing_is_compared():
    found = compare(counts(None, 1), counts(2, None))
    assert found == {"improved": False, "sentence": "No held-out problem could be judged both before and after."}


def test_a_run_of_no_steps_compares_no_evaluation_with_itself(small):
    assert loop.train(small("run.steps=0"), quiet=True)["sentence"].startswith("No step was taken")


def test_a_run_whose_verifier_always_fails_still_ends_with_a_report(small, digits, monkeypatch, tmp_path):
    task = digits(broken=tuple(f"held out {i}" for i in range(4)))
    monkeypatch.setattr(loop, "make_task", lambda *_: task)
    assert loop.train(small("run.steps=1"), quiet=True)["sentence"].startswith("No held-out problem could be judged")
    assert (tmp_path / "run" / "report.png").is_file()


def judged(confidences, verdicts, **changed):
    arguments = {"samples": 2, "correct": [None] * (len(verdicts) // 2), "reasons": {}, "mean_length": 3.0}
    return Evaluation(**{**arguments, "confidences": confidences, "verdicts": verdicts, **changed})


def test_calibration_is_over_the_answers_that_were_judged():
    found = judged([0.9, 0.5, 0.5, 0.1, 0.2, 1.0], [True, True, False, False, None, None], stated=3).metrics()
    # (0.1^2 + 0.5^2 + 0.5^2 + 0.1^2) / 4; bins 0.9 and 0.1 are off by 0.1, that of 0.5 not; pairs: 3 won, 1 tied.
    assert found["eval/brier"] == pytest.approx(0.13)
    assert found["eval/ece"] == pytest.approx((0.1 + 0.1) / 4)
    assert found["eval/auroc"] == 0.875
    assert found["eval/frac_stated"] == 0.5


def test_auroc_is_left_out_where_it_is_undefined_and_everything_where_nothing_was_judged():
    found = judged([0.9, 0.5], [True, True]).metrics()
    assert "eval/auroc" not in found
    assert found["eval/ece"] == pytest.approx(0.3)
    assert not {"eval/brier", "eval/ece", "eval/auroc"} & set(judged([0.9, 0.5], [None, None]).metrics())
    assert not {"eval/brier", "eval/ece", "eval/auroc"} & set(counts(4, 0).metrics())


def test_the_confidence_is_the_mean_probability_of_the_tokens_up_to_the_end_token(untrained, small, digits):
    config = small()
    rollouts = sample(untrained, digits().held_out, config, 3, 0.7)
    found, stated = confidences_of(untrained, rollouts, 0.7, batch_size=100)
    assert stated == 0
    with torch.no_grad():
        hidden = untrained.hidden_states(rollouts.input_ids, rollouts.attention_mask, rollouts.completion_ids.shape[1])
        every = (untrained.head.logits(hidden) / 0.7).softmax(-1)
    chosen = every.gather(-1, rollouts.completion_ids[..., None])[..., 0]
    expected = (chosen * rollouts.completion_mask).sum(1) / rollouts.completion_mask.sum(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    in_parts, _ = confidences_of(untrained, rollouts, 0.7, batch_size=2)
    assert in_parts == pytest.approx(found, rel=1e-5)


def test_equal_completions_of_a_prompt_are_scored_once(untrained, small, digits, monkeypatch):
    rollouts = sample(untrained, digits().held_out, small(), 2, 1.0)
    alone, _ = confidences_of(untrained, rollouts, 1.0, batch_size=100)
    scored, own = [], scoring.scores_of
    monkeypatch.setattr(scoring, "scores_of", lambda p, part, t: scored.append(len(part)) or own(p, part, t))
    distinct = len({tuple(row) for row in rollouts.input_ids.tolist()})
    twice = rollouts.select([*range(8), *range(8)])
    found, _ = confidences_of(untrained, twice, 1.0, batch_size=3)
    assert sum(scored) == distinct
    assert max(scored) <= 3
    assert found == pytest.approx(alone + alone, rel=1e-5)


def test_a_stated_confidence_is_taken_instead_and_counted(untrained, small, digits):
    rollouts = sample(untrained, digits().held_out, small(), 1, 1.0)
    silent, _ = confidences_of(untrained, rollouts, 1.0, batch_size=100)
    rollouts.texts[1] = "4 <confidence>35%</confidence>"
    rollouts.texts[2] = "4 <confidence>35</confidence>"  # cannot be read
    found, stated = confidences_of(untrained, rollouts, 1.0, batch_size=100)
    assert stated == 1
    assert found[1] == 0.35
    assert [found[i] for i in (0, 2, 3)] == pytest.approx([silent[i] for i in (0, 2, 3)], rel=1e-5)


def test_an_evaluation_holds_a_confidence_and_a_verdict_of_every_answer(untrained, small, digits):
    found = evaluate(untrained, digits(broken=("held out 1",), solved=("held out 2",)), small())
    assert len(found.confidences) == len(found.verdicts) == 4 * 2
    assert found.verdicts[2:4] == [None, None]
    assert found.verdicts[4:6] == [True, True]
    assert all(0 <= value <= 1 for value in found.confidences)
    assert Evaluation(**json.loads(json.dumps(found.to_dict()))) == found


def test_evaluating_in_between_changes_no_bit_of_training(small, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "make_task", lambda *_: digits())
    rows = []
    for every in (0, 1):
        config = small(f"evaluation.every={every}", "run.steps=3", f"run.out={tmp_path / str(every)}")
        loop.train(config, quiet=True)
        logged = read_jsonl(tmp_path / str(every) / "metrics.jsonl")
        rows.append([{k: v for k, v in row.items() if "perf/" not in k} for row in logged if "eval/brier" not in row])
    assert len(rows[0]) == 3
    assert rows[0] == rows[1]


def test_a_run_from_before_confidences_were_recorded_can_still_be_plotted(small, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "make_task", lambda *_: digits())
    loop.train(small("run.steps=1"), quiet=True)
    run = tmp_path / "run"
    rows = read_jsonl(run / "evaluations.jsonl")
    assert all(len(row["confidences"]) == 8 for row in rows)
    old = [{k: v for k, v in row.items() if k not in ("confidences", "verdicts", "stated")} for row in rows]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    (run / "report.png").unlink()
    assert report.plot(run).read_bytes().startswith(b"\x89PNG")


def drawn(*evaluations):
    """The title, the labelled curves and the texts of a reliability plot."""
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    report._reliability(axis, [{"step": i, **found.to_dict()} for i, found in enumerate(evaluations)])
    curves = {line.get_label(): line.get_xydata().tolist() for line in axis.lines if line.get_label()[0] != "_"}
    return axis.get_title(), curves, [text.get_text() for text in axis.texts]


def test_the_reliability_plot_has_a_point_per_filled_bin_and_the_numbers_of_the_last_evaluation_above():
    before, after = judged([0.75, 0.75], [True, False]), judged([0.25, 0.95], [False, True])
    title, curves, texts = drawn(before, after)
    # after: Brier (0.25^2 + 0.05^2) / 2, ECE (0.25 + 0.05) / 2
    assert title == "reliability after\nECE 0.150, Brier 0.033, AUROC 1.00"
    assert curves == {"before (step 0)": [[0.75, 0.5]], "after (step 1)": [[0.25, 0.0], [0.95, 1.0]]}
    assert texts == []


def test_the_reliability_plot_says_what_is_not_there():
    assert drawn(counts(4)) == ("held-out reliability", {}, ["not recorded"])
    assert drawn(judged([0.75, 0.75], [True, True]))[0].endswith("AUROC undefined")
    title, curves, _ = drawn(counts(4), judged([0.75, 0.25], [True, False]))
    assert title.startswith("reliability after")
    assert list(curves) == ["after (step 1)"]
