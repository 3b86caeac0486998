"""Reading /proc: pure parsing."""

import pytest

from hypervisor.agent.resources import FixedResources, cpu_times, memory_of
from hypervisor.core.errors import Internal
from hypervisor.core.resources import GIB, Resources

STAT = """cpu  100 20 30 800 50 3 7 11 40 5
cpu0 50 10 15 400 25 1 3 5 20 2
intr 1 2 3
"""
MEMINFO = """MemTotal:       2048 kB
MemFree:         100 kB
MemAvailable:   1024 kB
Buffers:          10 kB
"""


def test_waiting_for_disks_is_idle_and_stolen_time_busy() -> None:
    busy, total = cpu_times(STAT)

    assert total == 100 + 20 + 30 + 800 + 50 + 3 + 7 + 11
    assert total - busy == 800 + 50


def test_guest_time_is_not_counted_twice() -> None:
    without_guests = STAT.replace(" 40 5\n", " 0 0\n", 1)

    assert cpu_times(STAT) == cpu_times(without_guests)


def test_an_old_kernels_short_line_is_read() -> None:
    assert cpu_times("cpu 1 2 3 4\n") == (6, 10)


@pytest.mark.parametrize("text", ["", "cpu0 1 2 3 4 5", "cpu 1 2"])
def test_what_is_no_stat_is_refused(text: str) -> None:
    with pytest.raises(Internal):
        cpu_times(text)


def test_memory_is_total_and_available_in_bytes() -> None:
    assert memory_of(MEMINFO) == (2048 * 1024, 1024 * 1024)


def test_meminfo_without_available_is_refused() -> None:
    with pytest.raises(Internal):
        memory_of("MemTotal: 2048 kB\n")


async def test_a_simulated_node_has_what_it_was_given_and_uses_nothing() -> None:
    capacity = Resources(cpu_millis=8000, memory_bytes=32 * GIB, disk_bytes=512 * GIB)

    read = await FixedResources(capacity).read()

    assert read.capacity == capacity
    assert (read.cpu_used_millis, read.memory_used_bytes, read.disk_used_bytes) == (0, 0, 0)
