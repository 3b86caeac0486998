"""What benchmarks of sampling make, control groups and processes in them, is gone however they end."""

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import measure_cgroups
import pytest

ROOT = Path("/sys/fs/cgroup")
PROGRAM = """
import sys, time
from measure_cgroups import cgroups, end_tidily, inhabited
end_tidily()
with cgroups(sys.argv[1], int(sys.argv[2])) as groups, inhabited(groups) as pids:
    print(*pids, flush=True)
    time.sleep(1000)
"""
END_S = 60.0

pytestmark = pytest.mark.skipif(
    bool(measure_cgroups.cgroups_missing()), reason=measure_cgroups.cgroups_missing()
)


@pytest.fixture
def name() -> str:
    return f"hvtest-bench-{uuid.uuid4().hex[:12]}"


@contextmanager
def measuring(name: str, count: int) -> Iterator["subprocess.Popen[str]"]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, name, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def left(name: str) -> list[Path]:
    return [controller / name for controller in ROOT.iterdir() if (controller / name).exists()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_removes_all_groups_and_ends_the_processes_in_them(
    name: str, number: signal.Signals
) -> None:
    with measuring(name, 20) as process:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], END_S)
        assert ready, "the groups are not made"
        pids = process.stdout.readline().split()
        assert len(pids) == 20
        assert len(left(name)) == len(measure_cgroups.CONTROLLERS)

        process.send_signal(number)
        _, errors = process.communicate(timeout=END_S)

    assert left(name) == []
    assert not any(Path("/proc", pid).exists() for pid in pids)
    assert process.returncode == (-number if number == signal.SIGINT else 128 + number), errors


@pytest.mark.parametrize("place", ["cpuacct/{name}/i30", "blkio/{name}/i30/cgroup.procs"])
def test_a_signal_while_groups_are_made_or_entered_leaves_nothing(name: str, place: str) -> None:
    awaited = ROOT / place.format(name=name)
    deadline = time.monotonic() + END_S
    with measuring(name, 400) as process:
        while not awaited.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline

        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=END_S)

    assert left(name) == []
    assert process.returncode == 128 + signal.SIGTERM, errors
