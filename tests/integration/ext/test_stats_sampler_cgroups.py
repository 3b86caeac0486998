"""The sampler with the kernel's own control groups (v1, the pressure of a hybrid, or v2) and interfaces."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from hvtest_control_groups import Groups, pressure_is_kept
from hvtest_stats import SECOND, AnySampler, SamplerType, newest
from hypervisor.ext.stats_sampler import Sources

SPIN = """
import time
input()
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
print(flush=True)
input()
"""
PAIRS = 30
NETWORK = f"""
import socket, subprocess
from pathlib import Path
for default in ("all", "default"):  # nobody else says anything there
    file = Path("/proc/sys/net/ipv6/conf", default, "disable_ipv6")
    if file.exists():
        file.write_text("1")
commands = ["link set lo up"]
for i in range({PAIRS}):
    commands += [f"link add a{{i}} type veth peer name b{{i}}", f"link set a{{i}} up", f"link set b{{i}} up"]
subprocess.run(["ip", "-batch", "-"], input="\\n".join(commands), text=True, check=True)
for i in range({PAIRS}):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as packets:
        packets.bind((f"a{{i}}", 0))
        packets.send(b"\\xff" * 100 * (i % 9 + 1))
print(flush=True)
input()
"""


def test_what_a_process_uses_is_seen(make: SamplerType, groups: Groups) -> None:
    sources = groups.make("spinner")
    with subprocess.Popen(
        [sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            groups.join("spinner", process.pid)
            with make(slow_period_ns=0) as sampler:
                slot = sampler.add(
                    Sources(
                        cgroup1=sources.cgroup1,
                        cgroup2=sources.cgroup2,
                        net_dev=f"/proc/{process.pid}/net/dev",
                    )
                )
                begin = time.monotonic_ns()
                sampler.sample_all(begin, time.time_ns())
                process.stdin.write("\n")
                process.stdin.flush()
                process.stdout.readline()
                end = time.monotonic_ns()
                sampler.sample_all(end, time.time_ns())
                first, record = sampler.history(slot)
        finally:
            process.kill()
            process.wait()

    assert first.cpu_usage_ns is not None
    assert record.cpu_usage_ns is not None
    used = record.cpu_usage_ns - first.cpu_usage_ns
    assert used > 200_000_000
    assert record.cpu_used_cores == pytest.approx(used / (end - begin))
    assert record.pids == 1
    assert (record.oom_kills, record.block_read_bytes) == (0, 0)
    assert record.memory_used_bytes is not None
    assert record.memory_working_set_bytes is not None
    assert 0 <= record.memory_working_set_bytes <= record.memory_used_bytes
    assert record.memory_limit_bytes is None
    assert record.network_receive_bytes is not None
    assert (record.cpu_pressure_some_ns is not None) == pressure_is_kept()


def test_a_group_that_is_removed_is_gone_and_the_others_go_on(make: SamplerType, groups: Groups) -> None:
    with make() as sampler:
        doomed, other = (sampler.add(groups.make(name)) for name in ("doomed", "other"))
        assert sampler.sample_all(0, 0) == 2
        open_before = sampler.open_files()

        groups.remove("doomed")

        assert sampler.sample_all(SECOND, 0) == 1
        assert sampler.gone() == [doomed]
        assert sampler.open_files() == open_before // 2
        assert newest(sampler, doomed).sequence == 1
        assert newest(sampler, other).sequence == 2
        assert not sampler.sample(doomed, 2 * SECOND, 0)

        sampler.reopen(doomed, groups.make("again"))
        assert sampler.sample_all(3 * SECOND, 0) == 2
        assert sampler.gone() == []


def test_groups_removed_while_they_are_read_disturb_nothing(make: SamplerType, groups: Groups) -> None:
    """Groups vanish between and during the reads of a thread that samples without end, and slots with them."""
    with make(history=4, slow_period_ns=0) as sampler:
        steady = [sampler.add(groups.make(f"steady{i}")) for i in range(8)]
        over = threading.Event()
        failures: list[BaseException] = []

        def sample_without_end(sampler: AnySampler = sampler) -> None:
            now = 0
            try:
                while not over.is_set():
                    now += 1
                    sampler.sample_all(now, now)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=sample_without_end)
        thread.start()
        try:
            for turn in range(40):
                slot = sampler.add(groups.make("passing"))
                if turn % 2:
                    sampler.sample(slot, 0, 0)
                groups.remove("passing")
                if turn % 3:
                    sampler.sample(slot, 0, 0)
                    assert sampler.gone() == [slot]
                sampler.remove(slot)
        finally:
            over.set()
            thread.join()

        assert failures == []
        assert sampler.gone() == []
        assert sampler.slots() == steady
        assert all(newest(sampler, slot).cpu_usage_ns is not None for slot in steady)


def test_an_interface_of_this_machine_is_read(make: SamplerType) -> None:
    with make() as sampler:
        tap, device = (
            sampler.add(Sources(tap="/sys/class/net/lo/statistics")),
            sampler.add(Sources(net_dev="/proc/self/net/dev")),
        )
        assert sampler.sample_all(0, 0) == 2

        assert newest(sampler, tap).network_receive_bytes is not None
        assert newest(sampler, device).network_receive_bytes is not None


def test_a_file_that_the_kernel_hands_out_in_parts_is_read_to_its_end(make: SamplerType) -> None:
    """A read of /proc/PID/net/dev ends after a whole line before a page is full; with many interfaces that is soon."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("there is no unshare or no ip")
    probe = ["unshare", "--net", "ip", "link", "add", "a0", "type", "veth", "peer", "name", "b0"]
    probed = subprocess.run(probe, capture_output=True, text=True, check=False)
    if probed.returncode:
        pytest.skip(f"interfaces cannot be made here: {probed.stderr}")
    command = ["unshare", "--net", sys.executable, "-c", NETWORK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "\n", "the network is not made"
            path = f"/proc/{process.pid}/net/dev"
            fd = os.open(path, os.O_RDONLY)
            first_part = len(os.pread(fd, 65_536, 0))
            os.close(fd)
            with make() as sampler:
                slot = sampler.add(Sources(net_dev=path))
                sampler.sample(slot, 0, 0)
                record = newest(sampler, slot)
        finally:
            process.kill()
            process.wait()

    assert first_part < 4096, "the file is handed out in parts"
    octets = sum(100 * (number % 9 + 1) for number in range(PAIRS))
    assert (record.network_transmit_bytes, record.network_transmit_packets) == (octets, PAIRS)
    assert (record.network_receive_bytes, record.network_receive_packets) == (octets, PAIRS)
