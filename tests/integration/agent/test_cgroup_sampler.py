"""Statistics out of recorded control group trees, cgroup v1 and v2."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from hypervisor.agent.drivers.cpu_quota import apply_cpu_limit, cpu_limit
from hypervisor.agent.drivers.containerd.swap_limit import forbid_swap, specification_limits_swap
from hypervisor.agent.stats.cgroups import (
    CgroupPaths,
    cgroup_paths,
    expected_paths,
    read_oom_kills,
    sampler_sources,
)
from hypervisor.agent.stats.records import stats_of
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
