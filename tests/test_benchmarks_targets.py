"""The targets, against results that are written here."""

import csv
from dataclasses import asdict

import pytest

from benchmarks.cases import Case, cases
from benchmarks.systems import SYSTEMS
from benchmarks.targets import TARGETS, compared, markdown

LARGE = Case("ace", 8192, 4096, 131072, 16, "bfloat16")


def row(key, kind, ms, **fields):
    return {"key": key, "kind": kind, "median_ms": ms, "errors": {"logps": 1e-6, "d_hidden": 2e-3}} | fields


def result(case, *rows):
    return {"case": asdict(case), "systems": list(rows)}


def test_a_target_is_met_or_missed_by_the_field_that_it_names():
    half = Case("ace", 8192, 4096, 131072, 16, "bfloat16", active=0.5)
    eager = row("eager-cross_entropy", "eager", 60.0), row("eager-logsumexp", "eager", 50.0, errors={"d_hidden": 1e-3})
    ours = row("rlvr_ops", "ours", 39.0, workspace_bytes=2.1e9)
    results = [
        result(LARGE, row("products", "products", 36.0), *eager, ours, row("trl", "peer", 80.0)),
        result(half, row("rlvr_ops", "ours", 20.0), row("trl", "peer", 80.0)),
    ]
    found = {(name, what, of): (share, met) for name, _, what, of, _, share, met in compared(results)}
    assert found[LARGE.name, "median_ms", "products"] == (pytest.approx(39 / 36), "missed")
    assert found[LARGE.name, "median_ms", "eager"] == (pytest.approx(39 / 50), "met")
    assert found[LARGE.name, "median_ms", "trl"] == (pytest.approx(39 / 80), "met")
    assert found[LARGE.name, "workspace_bytes", ""] == (2.1e9, "met")
    assert found[LARGE.name, "d_hidden", "eager"] == (pytest.approx(2.0), "missed")
    assert found[half.name, "median_ms", "all rows"] == (pytest.approx(20 / 39), "met")
    assert markdown(results).splitlines()[2].endswith("missed |")


def test_every_target_names_a_case_and_a_system_of_the_suite():
    suite = [case for device in ("cuda", "cpu") for case in cases(device, quick=False)]
    known = {"workspace_bytes": 1.0, "peak_bytes": 1.0, "errors": dict.fromkeys(("logps", "d_hidden", "d_weight"), 1.0)}
    rows = [row(one.key, one.kind, 1.0, **known) for one in SYSTEMS]
    found = {(what, of, limit) for _, _, what, of, limit, *_ in compared([result(case, *rows) for case in suite])}
    with TARGETS.open() as lines:
        assert found == {(one["field"], one["of"], float(one["limit"])) for one in csv.DictReader(lines)}
