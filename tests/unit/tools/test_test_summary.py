"""tools/test_summary.py: what it counts, lists and refuses to call a success."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_summary as summary_tool

MIXED = """<testsuites><testsuite name="pytest">
<testcase name="test_good"/>
<testcase name="test_better"/>
<testcase name="test_bad"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase name="test_broken"><error message="fixture failed"/></testcase>
<testcase name="test_left_out"><skipped message="no /dev/kvm"/></testcase>
</testsuite></testsuites>"""

GOOD = "<testsuites><testsuite><testcase name='test_good'/></testsuite></testsuites>"


def finished(code: int = 0) -> dict[str, Any]:
    return {"id": {"buildFinished": {}}, "finished": {"exitCode": {"name": "X", "code": code}}}


def result(
    label: str, xml: Path | None, *, status: str = "PASSED", shard: int = 1, attempt: int = 1
) -> dict[str, Any]:
    outputs = [{"name": "test.log", "uri": "file:///nowhere/test.log"}]
    if xml is not None:
        outputs.append({"name": "test.xml", "uri": xml.as_uri()})
    return {
        "id": {"testResult": {"label": label, "run": 1, "shard": shard, "attempt": attempt}},
        "testResult": {"status": status, "testActionOutput": outputs},
    }


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "with space" / "good.xml"
    path.parent.mkdir()
    path.write_text(GOOD)
    return path


def last_line(summary: summary_tool.Summary) -> str:
    return summary.lines()[-1]


def test_each_case_counts_and_each_failure_and_skip_is_named(tmp_path: Path) -> None:
    xml = tmp_path / "test.xml"
    xml.write_text(MIXED)

    summary = summary_tool.summarize([result("//a:b", xml, status="FAILED"), finished(3)])

    assert summary.lines() == [
        "SKIPPED //a:b test_left_out: no /dev/kvm",
        "FAILED //a:b test_bad: assert 1 == 2",
        "FAILED //a:b test_broken: fixture failed",
        "2 passed, 2 failed, 1 skipped",
    ]
    assert not summary.ok


def test_all_good_is_a_success(good: Path) -> None:
    summary = summary_tool.summarize([result("//a:b", good), finished()])

    assert last_line(summary) == "1 passed, 0 failed, 0 skipped"
    assert summary.ok


def test_shards_add_up(good: Path) -> None:
    events = [result("//a:b", good, shard=shard) for shard in (1, 2, 3)]

    assert last_line(summary_tool.summarize([*events, finished()])) == "3 passed, 0 failed, 0 skipped"


def test_the_last_attempt_of_a_shard_counts(tmp_path: Path, good: Path) -> None:
    bad = tmp_path / "bad.xml"
    bad.write_text(MIXED)

    events = [result("//a:b", bad, status="FAILED"), result("//a:b", good, attempt=2), finished()]

    assert last_line(summary_tool.summarize(events)) == "1 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("status", ["FAILED", "TIMEOUT", "INCOMPLETE", "REMOTE_FAILURE"])
def test_a_bad_status_is_a_failure_whatever_the_xml_says(good: Path, status: str) -> None:
    summary = summary_tool.summarize([result("//a:b", good, status=status), finished(3)])

    assert summary.failures == [f"//a:b: {status}"]


@pytest.mark.parametrize("content", [None, "", "<testsuites/>", "<testsuites><unclosed"])
def test_a_pass_without_a_readable_case_is_a_failure(tmp_path: Path, content: str | None) -> None:
    xml = tmp_path / "test.xml"
    if content is not None:
        xml.write_text(content)

    summary = summary_tool.summarize([result("//a:b", xml), finished()])

    assert summary.failures == ["//a:b: passed without a test case"]


def test_an_empty_shard_is_no_failure_where_its_siblings_have_the_tests(tmp_path: Path, good: Path) -> None:
    empty = tmp_path / "empty.xml"
    empty.write_text("<testsuites/>")

    events = [result("//a:b", good, shard=1), result("//a:b", empty, shard=2), finished()]

    assert summary_tool.summarize(events).ok


def test_a_target_that_did_not_build_is_a_failure(good: Path) -> None:
    broken = {"id": {"targetCompleted": {"label": "//x:y"}}, "completed": {}}

    summary = summary_tool.summarize([result("//a:b", good), broken, finished(1)])

    assert summary.failures == ["//x:y: did not build (see the log above)"]


def test_bazels_own_failure_is_a_failure(good: Path) -> None:
    assert summary_tool.summarize([result("//a:b", good), finished(37)]).failures == ["bazel: exit code 37"]


def test_a_run_broken_off_is_a_failure(good: Path) -> None:
    assert not summary_tool.summarize([result("//a:b", good)]).ok


def test_no_test_at_all_is_no_success() -> None:
    summary = summary_tool.summarize([finished()])

    assert summary.lines() == ["no test ran", "0 passed, 0 failed, 0 skipped"]
    assert not summary.ok


def test_the_command_reads_events_and_answers_by_exit_code(
    tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events.json"
    events.write_text("\n".join(json.dumps(event) for event in [result("//a:b", good), finished()]) + "\n")

    assert summary_tool.main([str(events)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"


def test_a_missing_event_file_is_a_failure(tmp_path: Path) -> None:
    assert summary_tool.main([str(tmp_path / "none.json")]) == 1
