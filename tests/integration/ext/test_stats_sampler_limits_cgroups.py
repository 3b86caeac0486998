"""A process at its limits, and what it reads and writes, as the sampler sees it in its real control group."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hvtest_control_groups import ROOT, Groups
from hvtest_stats import SamplerType, newest

MIB = 1 << 20
BEGIN = "import sys; sys.stdin.readline()\n"
END = "\nprint('done', flush=True); sys.stdin.readline()"
HOG = f"memory = b'x' * {256 * MIB}"
SPIN = """
import time
end = time.monotonic() + 1.0
while time.monotonic() < end:
    pass
"""
TRANSFER = f"""
import mmap, os
page = mmap.mmap(-1, {MIB})
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT)
for _ in range(4):
    os.write(fd, page)
os.lseek(fd, 0, 0)
os.readv(fd, [page])
"""


@contextmanager
def in_group(groups: Groups, name: str, program: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A process in the group that runs the program once :func:`go` lets it, and then waits for its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program + END, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        groups.join(name, process.pid)
        yield process
    finally:
        process.kill()
        process.communicate()


def go(process: "subprocess.Popen[str]") -> str:
    """Run it; what it says at its end, nothing when it was killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_a_kill_for_lack_of_memory_counts(make: SamplerType, groups: Groups) -> None:
    sources = groups.make("hog")
    groups.limit_memory("hog", 64 * MIB)
    with make(slow_period_ns=0) as sampler, in_group(groups, "hog", HOG) as process:
        slot = sampler.add(sources)
        sampler.sample(slot, 0, 0)
        assert go(process) == "", "it has more memory than it may"
        process.wait()
        sampler.sample(slot, 1, 0)
        before, after = sampler.history(slot)

    assert (before.memory_limit_bytes, before.oom_kills, after.oom_kills) == (64 * MIB, 0, 1)
    assert (before.pids, after.pids) == (1, 0)


def test_being_held_back_at_a_processor_limit_is_seen(make: SamplerType, groups: Groups) -> None:
    sources = groups.make("spinner")
    try:
        groups.limit_processor("spinner", quota_us=10_000, period_us=50_000)
    except FileNotFoundError as error:
        pytest.skip(f"this kernel has no limit of processor time: {error}")
    with make(slow_period_ns=0) as sampler, in_group(groups, "spinner", SPIN) as process:
        slot = sampler.add(sources)
        sampler.sample(slot, time.monotonic_ns(), 0)
        assert go(process) == "done\n"
        sampler.sample(slot, time.monotonic_ns(), 0)
        record = newest(sampler, slot)

    assert record.cpu_throttled_periods is not None
    assert record.cpu_periods is not None
    assert 0 < record.cpu_throttled_periods <= record.cpu_periods
    assert record.cpu_throttled_ns is not None
    assert record.cpu_throttled_ns > 0
    assert record.cpu_throttled_share is not None
    assert 0.0 < record.cpu_throttled_share <= 1.0
    assert record.cpu_used_cores is not None
    assert 0.0 < record.cpu_used_cores < 0.5
    if record.cpu_pressure_some_ns is not None:
        assert record.cpu_pressure_some_ns > 0, "it waited for its processor"


def test_what_goes_to_and_comes_from_a_device_is_seen(
    make: SamplerType, groups: Groups, tmp_path: Path
) -> None:
    sources = groups.make("writer")
    if sources.cgroup1 and not version_one_counts(tmp_path):
        pytest.skip(
            "this kernel counts no transfers in version 1 until a device has a limit (Linux 6.10 and later)"
        )
    if not reaches_a_device(tmp_path / "probe"):
        pytest.skip(f"{tmp_path} is on no block device that can be written to directly")
    with (
        make(slow_period_ns=0) as sampler,
        in_group(groups, "writer", TRANSFER, str(tmp_path / "data")) as process,
    ):
        slot = sampler.add(sources)
        sampler.sample(slot, time.monotonic_ns(), 0)
        before = newest(sampler, slot)
        assert go(process) == "done\n"
        sampler.sample(slot, time.monotonic_ns(), 0)
        record = newest(sampler, slot)

    assert before.block_write_bytes is not None
    assert before.block_read_bytes is not None
    assert record.block_write_bytes is not None
    assert record.block_read_bytes is not None
    assert record.block_write_bytes - before.block_write_bytes >= 4 * MIB
    assert record.block_read_bytes - before.block_read_bytes >= MIB
    assert record.block_write_bytes_per_s is not None
    assert record.block_write_bytes_per_s > 0
    if not sources.cgroup1:
        assert record.block_write_ops is not None
        assert record.block_write_ops >= 4


def version_one_counts(directory: Path) -> bool:
    """Whether blkio names the device of a directory, in the group that has what all others have."""
    device = directory.stat().st_dev
    file = ROOT / "blkio/blkio.throttle.io_service_bytes_recursive"
    return f"{os.major(device)}:{os.minor(device)} " in file.read_text()


def reaches_a_device(path: Path) -> bool:
    """Whether files there are on a block device, past the page cache."""
    program = TRANSFER.replace("readv(fd, [page])", "fsync(fd)")
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + program, str(path)], capture_output=True, check=False
    )
    with suppress(FileNotFoundError):
        path.unlink()
    device = path.parent.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return done.returncode == 0 and Path("/sys/dev/block", number).exists()
