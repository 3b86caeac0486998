"""Control groups of VMMs, in the kernel's own hierarchies, version 1 or 2."""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.agent.drivers.microvm.control_groups import ControlGroups
from hypervisor.agent.stats.cgroups import uses_v2

ROOT = Path("/sys/fs/cgroup")


@pytest.fixture
def groups() -> Iterator[ControlGroups]:
    made = ControlGroups(ROOT, f"hvtest-{uuid.uuid4().hex[:12]}")
    try:
        made.make("probe", cpu_millis=1000, memory_bytes=64 << 20)
    except OSError as exc:
        made.remove_parent()
        pytest.skip(f"no control groups can be made here: {exc}")
    made.remove("probe")
    yield made
    for name in made.names():
        made.remove(name)
    made.remove_parent()


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def limits(groups: ControlGroups, name: str) -> tuple[str, str]:
    """Of memory and processor, as the kernel has them."""
    paths = groups.paths(name)
    if paths.unified is not None:
        return (
            (paths.unified / "memory.max").read_text().strip(),
            (paths.unified / "cpu.max").read_text().strip(),
        )
    memory, cpu = paths.controllers["memory"], paths.controllers["cpu"]
    quota, period = ((cpu / f"cpu.cfs_{part}_us").read_text().strip() for part in ("quota", "period"))
    return (memory / "memory.limit_in_bytes").read_text().strip(), f"{quota} {period}"


def test_a_group_has_its_limits(groups: ControlGroups) -> None:
    groups.make("one", cpu_millis=250, memory_bytes=64 << 20)

    assert groups.exists("one")
    assert limits(groups, "one") == (str(64 << 20), "25000 100000")
    assert groups.names() == ("one",)


def test_a_process_that_is_added_is_in_it_everywhere(
    groups: ControlGroups, process: "subprocess.Popen[bytes]"
) -> None:
    groups.make("one", cpu_millis=1000, memory_bytes=64 << 20)

    groups.add("one", process.pid)

    assert groups.pids("one") == (process.pid,)
    told = (Path("/proc") / str(process.pid) / "cgroup").read_text()
    paths = groups.paths("one")
    hierarchies = {path.resolve() for path in paths.controllers.values()}
    if uses_v2(ROOT) or (ROOT / "unified").is_dir():
        hierarchies.add(ROOT)
    assert told.count("/one\n") == len(hierarchies)


def test_one_that_is_removed_ends_what_is_in_it(
    groups: ControlGroups, process: "subprocess.Popen[bytes]"
) -> None:
    groups.make("one", cpu_millis=1000, memory_bytes=64 << 20)
    groups.add("one", process.pid)

    assert groups.remove("one")
    process.wait(timeout=10)
    groups.remove("one")

    assert not groups.exists("one")
    assert process.returncode == -9
    assert not groups.remove("one")


def test_one_that_is_made_again_has_the_new_limits(groups: ControlGroups) -> None:
    groups.make("one", cpu_millis=250, memory_bytes=64 << 20)

    groups.make("one", cpu_millis=500, memory_bytes=96 << 20)

    assert limits(groups, "one") == (str(96 << 20), "50000 100000")


def test_the_group_around_all_stays_while_there_is_one_in_it(groups: ControlGroups) -> None:
    groups.make("one", cpu_millis=250, memory_bytes=64 << 20)

    groups.remove_parent()
    assert groups.exists("one")
    groups.remove("one")
    groups.remove_parent()
    groups.make("two", cpu_millis=250, memory_bytes=64 << 20)

    assert groups.names() == ("two",)


def test_memory_that_was_too_much_is_counted(groups: ControlGroups) -> None:
    groups.make("one", cpu_millis=1000, memory_bytes=32 << 20)
    code = "input(); bytearray(200 << 20)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        groups.add("one", process.pid)
        process.communicate(b"\n", timeout=60)

    assert process.returncode == -9
    assert groups.oom_kills("one") == 1
