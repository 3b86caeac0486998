"""The runner behind py_test, run as Bazel runs it: in a process of its own, by environment and arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

MODULE = """
import pytest

@pytest.mark.parametrize("number", range(5))
def test_number(number):
    assert number < 5

@pytest.mark.skip(reason="no such device here")
def test_left_out():
    raise AssertionError

async def test_runs_without_a_mark():
    pass
"""


@pytest.fixture
def runfiles(tmp_path: Path) -> Path:
    workspace = tmp_path / "runfiles" / "hypervisor_repo"
    workspace.mkdir(parents=True)
    (workspace / "test_sample.py").write_text(MODULE)
    (workspace / "pyproject.toml").write_text('[tool.pytest.ini_options]\nasyncio_mode = "auto"\n')
    return workspace.parent


def run(runfiles: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("TEST", "XML_", "PYTEST"))
    }
    return subprocess.run(
        [sys.executable, "-m", "bazel_pytest", "hypervisor_repo/test_sample.py", *arguments],
        env={
            **inherited,
            "RUNFILES_DIR": str(runfiles),
            "XML_OUTPUT_FILE": str(runfiles / "test.xml"),
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def case_names(runfiles: Path) -> list[str]:
    return [
        case.get("name", "") for case in ElementTree.parse(runfiles / "test.xml").getroot().iter("testcase")
    ]


def test_all_tests_run_and_stand_in_the_xml(runfiles: Path) -> None:
    result = run(runfiles)

    assert result.returncode == 0, result.stdout
    assert len(case_names(runfiles)) == 7


def test_a_skip_is_printed_with_its_reason(runfiles: Path) -> None:
    result = run(runfiles)

    assert "no such device here" in result.stdout


def test_a_failing_test_fails_the_run(runfiles: Path) -> None:
    (runfiles / "hypervisor_repo" / "test_sample.py").write_text("def test_wrong():\n    assert 1 == 2\n")

    assert run(runfiles).returncode == 1


def test_shards_cover_every_test_once(runfiles: Path) -> None:
    seen: list[str] = []
    for index in range(3):
        result = run(runfiles, TEST_TOTAL_SHARDS="3", TEST_SHARD_INDEX=str(index))
        assert result.returncode == 0, result.stdout
        seen += case_names(runfiles)

    assert len(seen) == 7
    assert len(set(seen)) == 7


def test_a_shard_left_without_tests_passes(runfiles: Path) -> None:
    assert run(runfiles, TEST_TOTAL_SHARDS="9", TEST_SHARD_INDEX="8").returncode == 0


def test_sharding_is_announced_by_the_status_file(runfiles: Path) -> None:
    status = runfiles / "shard_status"

    run(runfiles, TEST_TOTAL_SHARDS="2", TEST_SHARD_INDEX="0", TEST_SHARD_STATUS_FILE=str(status))

    assert status.exists()


def test_a_filter_selects_by_expression(runfiles: Path) -> None:
    result = run(runfiles, TESTBRIDGE_TEST_ONLY="number and not 3")

    assert result.returncode == 0, result.stdout
    assert case_names(runfiles) == [f"test_number[{number}]" for number in (0, 1, 2, 4)]


@pytest.mark.parametrize("shards", ["1", "2"])
def test_no_test_found_is_a_failure(runfiles: Path, shards: str) -> None:
    result = run(
        runfiles, TESTBRIDGE_TEST_ONLY="nothing_of_that_name", TEST_TOTAL_SHARDS=shards, TEST_SHARD_INDEX="0"
    )

    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_module_that_cannot_be_imported_is_a_failure(runfiles: Path) -> None:
    (runfiles / "hypervisor_repo" / "test_sample.py").write_text("import no_such_module\n")

    assert run(runfiles).returncode not in {0, pytest.ExitCode.NO_TESTS_COLLECTED}
