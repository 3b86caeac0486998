"""What bench/run writes of the figures: the entries, what a partial run replaces, the table, the plots."""

import json
import xml.etree.ElementTree as ET
from dataclasses import asdict

import measure
import report


def _entry(bench: str, *, goal: float = 0.5, name: str = "picks", day: str = "2026-01-02") -> report.Entry:
    claim = measure.claim(
        name,
        [60.0, 80.0, 70.0],
        [100.0, 100.0, 100.0],
        unit="picks/s",
        reference_name="a loop in C",
        better="more",
        goal=goal,
    )
    return report.entry(bench, asdict(claim) | {"met": claim.met}, day=day, machine="2 cores")


def _missing() -> report.Entry:
    claim = measure.unmeasured(
        "cgtop", reference_name="systemd-cgtop", better="less", goal=0.02, why="it is <not> installed"
    )
    return report.entry("stats", asdict(claim) | {"met": claim.met}, day="2026-01-02", machine="2 cores")


def test_an_entry_says_what_was_measured_against_what():
    entry = json.loads(json.dumps(_entry("scoring")))

    assert entry["bench"] == "scoring"
    assert entry["value"] == 70.0
    assert entry["limit"] == {"name": "a loop in C", "value": 100.0}
    assert entry["peer"] is None
    assert entry["ratio"] == 0.7
    assert entry["met"] is True
    assert entry["spread"] == {"low": 0.6, "high": 0.8, "runs": 3}


def test_a_goal_that_is_missed_is_not_met():
    assert _entry("scoring", goal=0.75)["met"] is False


def test_a_peer_that_is_not_here_is_said_and_counts_as_neither():
    entry = _missing()

    assert entry["met"] is None
    assert entry["peer"] == {"name": "systemd-cgtop", "value": None}
    assert "not measured: it is <not> installed" in report.table([entry])


def test_a_partial_run_replaces_what_it_measured_and_keeps_the_rest():
    old = [_entry("scoring", name="old"), _entry("stats", name="kept", day="2025-12-31")]

    now = report.merged(old, [_entry("scoring", name="new")], benches=["scoring"])

    assert [one["metric"] for one in now] == ["new", "kept"]


def test_a_benchmark_that_lost_a_claim_keeps_none_of_it():
    old = [_entry("scoring", name="first"), _entry("scoring", name="second")]

    now = report.merged(old, [_entry("scoring", name="first")], benches=["scoring"])

    assert [one["metric"] for one in now] == ["first"]


def test_the_table_groups_by_day_and_machine():
    text = report.table([_entry("scoring"), _entry("stats", day="2025-12-31")])

    assert text.index("## 2025-12-31: 2 cores") < text.index("## 2026-01-02: 2 cores")
    assert "| picks | **0.7** [0.6..0.8, 3 runs] | a loop in C | 70 / 100 picks/s | ≥ 0.5: met |" in text


def test_the_page_has_a_plot_a_benchmark_and_escapes_what_it_shows():
    text = report.page([_entry("scoring"), _missing()])

    plots = [ET.fromstring(line[line.index("<svg") :]) for line in text.splitlines() if "<svg" in line]
    assert len(plots) == 2
    assert len(plots[0].findall("circle")) == 1
    assert len(plots[1].findall("circle")) == 0
    assert "<not>" not in text
