"""Statistics out of recorded control group trees, cgroup v1 and v2."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from hypervisor.agent.drivers.containerd.swap_limit import forbid_swap, specification_limits_swap
from hypervisor.agent.drivers.cpu_quota import apply_cpu_limit, cpu_limit
from hypervisor.agent.stats.cgroups import (
    CgroupPaths,
    cgroup_paths,
    expected_paths,
    read_oom_kills,
    sampler_sources,
)
from hypervisor.agent.stats.records import stats_of
from hypervisor.core.model import InstanceStats, Pressure
from hypervisor.ext.stats_sampler import Sampler

MOMENT = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)
WALL_NS = 1_778_051_289_000_000_000
UNIT = "hypervisor/i-1"

# Recorded on Linux 6.1; shortened where a file has lines that nothing reads.
V2 = {
    "cpu.stat": "usage_usec 2503415\nuser_usec 2401200\nsystem_usec 102215\nnr_periods 41\nnr_throttled 7\n"
    "throttled_usec 350021\nnr_bursts 0\nburst_usec 0\n",
    "memory.current": "7340032\n",
    "memory.max": "67108864\n",
    "memory.stat": "anon 1228800\nfile 5578752\nkernel 303104\ninactive_anon 1216512\nactive_anon 12288\n"
    "inactive_file 4194304\nactive_file 1384448\nunevictable 0\n",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n",
    "io.stat": "254:0 rbytes=1048576 wbytes=4096 rios=20 wios=1 dbytes=0 dios=0\n"
    "254:16 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n",
    "pids.current": "5\n",
}
V1 = {
    "cpuacct": {"cpuacct.usage": "2503415000\n"},
    "cpu": {"cpu.stat": "nr_periods 41\nnr_throttled 7\nthrottled_time 350021000\n"},
    "memory": {
        "memory.usage_in_bytes": "7340032\n",
        "memory.limit_in_bytes": "67108864\n",
        "memory.stat": "cache 5578752\ninactive_file 1\ntotal_cache 5578752\ntotal_inactive_file 4194304\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    },
    "blkio": {
        "blkio.throttle.io_service_bytes": "254:0 Read 1048576\n254:0 Write 4096\n254:0 Sync 1052672\n"
        "254:0 Total 1052672\n254:16 Read 4096\n254:16 Write 8192\nTotal 1064960\n"
    },
    "pids": {"pids.current": "5\n"},
}
PRESSURE = {
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500\nfull avg10=0.00 total=99\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=300\nfull avg10=0.00 total=200\n",
    "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=70\nfull avg10=0.00 total=60\n",
}
NET_DEV = (
    "Inter-|   Receive                            |  Transmit\n"
    " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier\n"
    "    lo:  999999 10 0 0 0 0 0 0  999999 10 0 0 0 0 0 0\n"
    "  eth0:    1500 10 0 0 0 0 0 0     700  8 0 0 0 0 0 0\n"
    "  eth1:      20  1 0 0 0 0 0 0       3  1 0 0 0 0 0 0\n"
)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    net = tmp_path / "proc" / "42" / "net"
    net.mkdir(parents=True)
    (net / "dev").write_text(NET_DEV)
    return tmp_path / "proc"


def v2_tree(root: Path) -> CgroupPaths:
    (root / UNIT).mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu io memory pids\n")
    for name, text in V2.items():
        (root / UNIT / name).write_text(text)
    paths = cgroup_paths(f"0::/{UNIT}\n", root=root)
    assert paths is not None
    return paths


def v1_tree(root: Path) -> CgroupPaths:
    lines = []
    for number, (controller, files) in enumerate(V1.items(), start=1):
        directory = root / controller / UNIT
        directory.mkdir(parents=True)
        lines.append(f"{number}:{controller}:/{UNIT}")
        for name, text in files.items():
            (directory / name).write_text(text)
    paths = cgroup_paths("\n".join([*lines, "10:name=systemd:/", "0::/"]), root=root)
    assert paths is not None
    return paths


@pytest.mark.parametrize("tree", [v1_tree, v2_tree])
def test_both_versions_give_the_same_numbers(tmp_path: Path, proc: Path, tree: object) -> None:
    paths = tree(tmp_path / "cgroup")  # type: ignore[operator]

    with Sampler() as sampler:
        slot = sampler.add(sampler_sources(paths, pid=42, proc_root=proc))
        sampler.sample(slot, 0, WALL_NS)
        record = sampler.latest(slot)

    assert record is not None
    stats = stats_of(record)
    assert stats.sampled_at == MOMENT
    assert stats.cpu_usage_ns == 2_503_415_000
    assert stats.cpu_used_cores is None
    assert (stats.cpu_throttled_periods, stats.cpu_throttled_ns) == (7, 350_021_000)
    assert stats.memory_used_bytes == 7_340_032
    assert stats.memory_working_set_bytes == 7_340_032 - 4_194_304
    assert stats.memory_limit_bytes == 67_108_864
    assert stats.oom_kills == 2
    assert stats.pids == 5
    assert (stats.block_read_bytes, stats.block_write_bytes) == (1_052_672, 12_288)
    assert (stats.network_receive_bytes, stats.network_transmit_bytes) == (1520, 703)
    assert stats.cpu_pressure is None


@pytest.mark.parametrize("tree", [v1_tree, v2_tree])
def test_oom_kills_are_read_without_a_process(tmp_path: Path, tree: object) -> None:
    root = tmp_path / "cgroup"
    tree(root)  # type: ignore[operator]

    assert read_oom_kills(expected_paths(f"/{UNIT}", root=root)) == 2
    assert read_oom_kills(expected_paths("/hypervisor/gone", root=root)) is None


def test_the_processor_quota_is_written_for_both_versions(tmp_path: Path) -> None:
    v1, v2 = v1_tree(tmp_path / "v1"), v2_tree(tmp_path / "v2")
    cpu = tmp_path / "v1" / "cpu" / UNIT
    for path in (cpu / "cpu.cfs_period_us", cpu / "cpu.cfs_quota_us", tmp_path / "v2" / UNIT / "cpu.max"):
        path.touch()

    for paths in (v1, v2):
        apply_cpu_limit(paths, cpu_limit(250))

    assert (cpu / "cpu.cfs_quota_us").read_text() == "25000"
    assert (cpu / "cpu.cfs_period_us").read_text() == "100000"
    assert (tmp_path / "v2" / UNIT / "cpu.max").read_text() == "25000 100000"


def test_a_quota_without_a_controller_is_an_error(tmp_path: Path) -> None:
    for paths in (CgroupPaths(None, {}), CgroupPaths(tmp_path, {})):
        with pytest.raises(FileNotFoundError):
            apply_cpu_limit(paths, cpu_limit(250))


def test_a_group_outside_of_the_visible_tree_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("")

    assert cgroup_paths("0::/../../secret\n", root=tmp_path) is None


def test_a_hybrid_counts_as_v1_where_its_controllers_are(tmp_path: Path) -> None:
    text = f"5:cpu,cpuacct:/{UNIT}\n4:memory:/{UNIT}\n1:name=systemd:/x\n0::/unified\n"

    paths = cgroup_paths(text, root=tmp_path)

    assert paths is not None
    assert paths.unified is None
    assert dict(paths.controllers) == {
        "cpu": tmp_path / "cpu" / UNIT,
        "cpuacct": tmp_path / "cpuacct" / UNIT,
        "memory": tmp_path / "memory" / UNIT,
    }


def hybrid_tree(root: Path, *, unified: str, files: dict[str, str]) -> CgroupPaths:
    """A tree of version 1 and beside it one of version 2 without controllers, the process in its group ``unified``."""
    controllers = v1_tree(root).controllers
    directory = root / "unified" / unified.lstrip("/")
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    lines = [f"{number}:{controller}:/{UNIT}" for number, controller in enumerate(controllers, start=1)]
    paths = cgroup_paths("\n".join([*lines, f"0::{unified}"]), root=root)
    assert paths is not None
    return paths


def sampled(paths: CgroupPaths, proc: Path) -> InstanceStats:
    with Sampler() as sampler:
        slot = sampler.add(sampler_sources(paths, pid=42, proc_root=proc))
        assert sampler.sample(slot, 0, WALL_NS)
        record = sampler.latest(slot)
    assert record is not None
    return stats_of(record)


def test_a_hybrid_has_its_pressure_from_the_unified_hierarchy(tmp_path: Path, proc: Path) -> None:
    # What else there is in version 2, without its controllers, must not take the place of their figures.
    files = PRESSURE | {"cpu.stat": "usage_usec 1\n", "pids.current": "99\n"}

    stats = sampled(hybrid_tree(tmp_path / "cgroup", unified=f"/{UNIT}", files=files), proc)

    assert (stats.cpu_usage_ns, stats.pids, stats.block_read_bytes) == (2_503_415_000, 5, 1_052_672)
    assert stats.cpu_pressure == Pressure(
        some_total_ns=1_500_000, full_total_ns=None, some_share=None, full_share=None
    )
    assert stats.memory_pressure is not None
    assert (stats.memory_pressure.some_total_ns, stats.memory_pressure.full_total_ns) == (300_000, 200_000)
    assert stats.io_pressure is not None
    assert (stats.io_pressure.some_total_ns, stats.io_pressure.full_total_ns) == (70_000, 60_000)


@pytest.mark.parametrize("shared", ["/", "/system.slice/containerd.service"])
def test_the_pressure_of_a_group_shared_with_others_is_not_the_instances(
    tmp_path: Path, proc: Path, shared: str
) -> None:
    stats = sampled(hybrid_tree(tmp_path / "cgroup", unified=shared, files=PRESSURE), proc)

    assert stats.pids == 5
    assert (stats.cpu_pressure, stats.memory_pressure, stats.io_pressure) == (None, None, None)


def test_a_kernel_that_keeps_no_pressure_is_no_error(tmp_path: Path, proc: Path) -> None:
    """Without /proc/pressure no group has a file of it, in a hybrid and in version 2 alike."""
    hybrid = hybrid_tree(tmp_path / "hybrid", unified=f"/{UNIT}", files={"cgroup.procs": ""})

    for paths in (hybrid, v2_tree(tmp_path / "v2")):
        stats = sampled(paths, proc)

        assert stats.pids == 5
        assert (stats.cpu_pressure, stats.memory_pressure, stats.io_pressure) == (None, None, None)


def test_a_hybrid_whose_unified_group_is_not_there_is_no_error(tmp_path: Path, proc: Path) -> None:
    v1_tree(tmp_path / "cgroup")

    assert sampled(expected_paths(UNIT, root=tmp_path / "cgroup"), proc).pids == 5


# The busiest is 254:0, which has a partition.
DISKSTATS = """   7       0 loop0 43 0 694 22 0 0 0 0 0 16 22 0 0 0 0 0 0
 254       0 vda 10 0 5000 9 10 0 4000 9 0 9 9 0 0 0 0 0 0
 254       1 vda1 10 0 5000 9 10 0 4000 9 0 9 9 0 0 0 0 0 0
"""
OTHER = "7:0 Read 0\n7:0 Write 4096\n7:0 Total 4096\nTotal 4096\n"
BUSIEST = "254:0 Read 0\n254:0 Write 4096\n254:0 Total 4096\n"


@pytest.mark.parametrize(
    ("of_all", "diskstats", "counted"),
    [
        ({"io_service_bytes_recursive": BUSIEST + OTHER, "io_service_bytes": "Total 0\n"}, DISKSTATS, True),
        ({"io_service_bytes_recursive": "Total 0\n", "io_service_bytes": "Total 0\n"}, DISKSTATS, False),
        ({"io_service_bytes_recursive": OTHER}, DISKSTATS, False),
        ({"io_service_bytes": BUSIEST + OTHER}, DISKSTATS, True),
        ({"io_service_bytes": "Total 0\n"}, "", False),
        ({"io_service_bytes": "Total 0\n"}, None, True),
        ({}, DISKSTATS, True),
    ],
)
def test_transfers_that_the_kernel_does_not_count_are_unknown_and_not_zero(
    tmp_path: Path, proc: Path, of_all: dict[str, str], diskstats: str | None, counted: bool
) -> None:
    root = tmp_path / "cgroup"
    v1_tree(root)
    for name, text in of_all.items():
        (root / "blkio" / f"blkio.throttle.{name}").write_text(text)
    if diskstats is not None:
        (proc / "diskstats").write_text(diskstats)

    stats = sampled(expected_paths(UNIT, root=root, proc_root=proc), proc)

    assert (stats.pids, stats.block_read_bytes) == (5, 1_052_672 if counted else None)
    text = f"1:blkio:/{UNIT}\n2:pids:/{UNIT}\n"
    paths = cgroup_paths(text, root=root, proc_root=proc)
    assert paths is not None
    assert set(paths.controllers) == ({"blkio", "pids"} if counted else {"pids"})


def test_the_specification_limits_swap_with_v1_that_accounts_for_it(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    assert not specification_limits_swap(tmp_path)

    (tmp_path / "memory" / "memory.memsw.limit_in_bytes").write_text("0\n")

    assert specification_limits_swap(tmp_path)


def test_with_v2_the_control_group_is_told_to_have_no_swap(tmp_path: Path) -> None:
    paths = v2_tree(tmp_path)
    assert paths.unified is not None
    assert not specification_limits_swap(tmp_path)
    limit = paths.unified / "memory.swap.max"

    # A kernel that does not account for swap has no such file.
    forbid_swap(paths)
    assert not limit.exists()

    limit.write_text("max\n")
    forbid_swap(paths)
    assert limit.read_text().startswith("0")


def test_with_v1_no_swap_is_left_to_the_specification(tmp_path: Path) -> None:
    forbid_swap(v1_tree(tmp_path))
    assert list(tmp_path.rglob("*swap*")) == []
