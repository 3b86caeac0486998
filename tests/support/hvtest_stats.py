"""Trees of control group files as kernels write them, and what tests of the sampler share."""

import os
from pathlib import Path
from typing import TypeAlias

from hypervisor.ext.stats_sampler import Record, _sampler_c, _sampler_py

__all__ = [
    "NET_DEV",
    "SECOND",
    "V1",
    "V2",
    "AnySampler",
    "SamplerType",
    "newest",
    "open_descriptors",
    "tree",
    "v1",
]

AnySampler: TypeAlias = "_sampler_c.Sampler | _sampler_py.Sampler"
SamplerType: TypeAlias = type["_sampler_c.Sampler"] | type["_sampler_py.Sampler"]

SECOND = 1_000_000_000

# Recorded on Linux 6.1; shortened where a file has lines that nothing reads.
V2 = {
    "cpu.stat": "usage_usec 2503415\nuser_usec 2401200\nsystem_usec 102215\nnr_periods 41\nnr_throttled 7\n"
    "throttled_usec 350021\nnr_bursts 0\nburst_usec 0\n",
    "memory.current": "7340032\n",
    "memory.max": "67108864\n",
    "memory.stat": "anon 1228800\nfile 5578752\nkernel 303104\ninactive_anon 1216512\nactive_anon 12288\n"
    "inactive_file 4194304\nactive_file 1384448\nunevictable 0\npgfault 900\npgmajfault 21\n",
    "memory.swap.current": "8192\n",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n",
    "io.stat": "254:0 rbytes=1048576 wbytes=4096 rios=20 wios=1 dbytes=0 dios=0\n"
    "254:16 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n",
    "pids.current": "5\n",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500\nfull avg10=0.00 total=99\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=300\nfull avg10=0.00 total=200\n",
    "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=70\nfull avg10=0.00 total=60\n",
}
V1 = {
    "cpuacct/cpuacct.usage": "2503415000\n",
    "cpu/cpu.stat": "nr_periods 41\nnr_throttled 7\nthrottled_time 350021000\n",
    "memory/memory.usage_in_bytes": "7340032\n",
    "memory/memory.limit_in_bytes": "67108864\n",
    "memory/memory.stat": "cache 1\nrss 1\ninactive_file 1\ntotal_cache 5578752\ntotal_rss 1228800\ntotal_swap 8192\n"
    "total_pgmajfault 21\ntotal_inactive_file 4194304\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "blkio/blkio.throttle.io_service_bytes": "254:0 Read 1048576\n254:0 Write 4096\n254:0 Sync 1052672\n"
    "254:0 Total 1052672\n254:16 Read 4096\n254:16 Write 8192\nTotal 1064960\n",
    "pids/pids.current": "5\n",
}
NET_DEV = (
    "Inter-|   Receive                            |  Transmit\n"
    " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier\n"
    "    lo:  999999 10 0 0 0 0 0 0  999999 10 0 0 0 0 0 0\n"
    "  eth0:    1500 10 0 0 0 0 0 0     700  8 0 0 0 0 0 0\n"
    "  eth1:      20  1 0 0 0 0 0 0       3  1 0 0 0 0 0 0\n"
)


def open_descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


def tree(root: Path, files: dict[str, str]) -> Path:
    """Make the files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(root: Path) -> dict[str, Path]:
    """The directories of a tree of version 1."""
    return {controller: root / controller for controller in ("cpuacct", "cpu", "memory", "blkio", "pids")}


def newest(sampler: AnySampler, slot: int) -> Record:
    """The newest record, which there has to be."""
    record = sampler.latest(slot)
    assert record is not None
    return record
