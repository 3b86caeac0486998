"""Count the test cases of a `bazel test` run and close with the line `N passed, N failed, N skipped`.

    tools/test_summary.py EVENTS.json

EVENTS.json is what `bazel test --build_event_json_file` wrote: it names exactly the tests of that run, those from the
cache included, and each one's test.xml. Every failure and every skip is listed, skips with their reason. A test that
left no readable test.xml, a target that did not build and a run that Bazel broke off count as one failure each. Exit
code: 0, or 1 on any failure or where no test ran.
"""

from __future__ import annotations

import json
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

__all__ = ["Summary", "main", "read_events", "summarize"]

# Bazel's overall statuses of a test in which every case may be believed.
_GOOD_STATUSES = frozenset({"PASSED", "FLAKY"})


@dataclass(slots=True)
class Summary:
    """What a run came to. `failures` and `skips` hold one line each."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures and self.passed > 0

    def lines(self) -> list[str]:
        """The report, the counts last."""
        report = [f"SKIPPED {line}" for line in sorted(self.skips)]
        report += [f"FAILED {line}" for line in sorted(self.failures)]
        if self.passed == 0 and not self.failures:
            report.append("no test ran")
        report.append(f"{self.passed} passed, {len(self.failures)} failed, {len(self.skips)} skipped")
        return report


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read a build event file: one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _first_line(element: ElementTree.Element) -> str:
    text = (element.get("message") or element.text or "").strip()
    return text.splitlines()[0] if text else "no message"


def _count_cases(summary: Summary, label: str, xml: Path) -> int:
    """Add the cases of one test.xml and say how many they are: 0 where it cannot be read."""
    try:
        root = ElementTree.parse(xml).getroot()
    except (OSError, ElementTree.ParseError):
        return 0
    cases = list(root.iter("testcase"))
    for case in cases:
        name = f"{label} {case.get('name', '?')}"
        broken = case.find("failure")
        if broken is None:
            broken = case.find("error")
        skipped = case.find("skipped")
        if broken is not None:
            summary.failures.append(f"{name}: {_first_line(broken)}")
        elif skipped is not None:
            summary.skips.append(f"{name}: {_first_line(skipped)}")
        else:
            summary.passed += 1
    return len(cases)


def _xml_path(result: Mapping[str, Any]) -> Path | None:
    for output in result.get("testActionOutput", []):
        if output.get("name") == "test.xml" and output.get("uri", "").startswith("file://"):
            return Path(urllib.request.url2pathname(urllib.parse.urlsplit(output["uri"]).path))
    return None


def summarize(events: Iterable[Mapping[str, Any]]) -> Summary:
    """Count what the events tell; reads the test.xml files that they name."""
    summary = Summary()
    results: dict[tuple[str, int, int], Mapping[str, Any]] = {}
    unbuilt: dict[str, str] = {}
    exit_code: int | None = None
    for event in events:
        kind, key = next(iter(event.get("id", {}).items()), ("", {}))
        if kind == "testResult":
            # A later attempt of the same shard takes the place of an earlier one.
            results[key["label"], key.get("run", 1), key.get("shard", 0)] = event.get("testResult", {})
        elif kind == "targetCompleted" and not event.get("completed", {}).get("success"):
            reason = event.get("aborted", {}).get("reason") or "see the log above"
            # An aspect or a target that was left out for another's fault is told by that other one.
            if reason != "SKIPPED":
                unbuilt[key["label"]] = reason
        elif kind == "buildFinished":
            exit_code = event.get("finished", {}).get("exitCode", {}).get("code", 0)
    passed_cases: dict[str, int] = {}
    for (label, _run, _shard), result in sorted(results.items()):
        status = result.get("status", "NO_STATUS")
        failures_before = len(summary.failures)
        xml = _xml_path(result)
        cases = _count_cases(summary, label, xml) if xml is not None else 0
        if status in _GOOD_STATUSES:
            # A shard may be left without a case; the whole test may not.
            passed_cases[label] = passed_cases.get(label, 0) + cases
        elif len(summary.failures) == failures_before:
            summary.failures.append(f"{label}: {status}")
    summary.failures += [
        f"{label}: passed without a test case" for label, cases in passed_cases.items() if cases == 0
    ]
    for label, reason in sorted(unbuilt.items()):
        summary.failures.append(f"{label}: did not build ({reason})")
    if exit_code is None:
        summary.failures.append("bazel: the run was broken off")
    elif exit_code != 0 and not summary.failures:
        summary.failures.append(f"bazel: exit code {exit_code}")
    return summary


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: test_summary.py EVENTS.json", file=sys.stderr)
        return 2
    try:
        events = read_events(Path(argv[0]))
    except (OSError, json.JSONDecodeError) as error:
        print(f"test_summary: {argv[0]}: {error}", file=sys.stderr)
        events = []
    summary = summarize(events)
    print("\n".join(summary.lines()))
    return 0 if summary.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
