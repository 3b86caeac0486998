"""The kernel's own control groups for tests: version 1, the hybrid, or version 2, whichever this machine has."""

from contextlib import suppress
from pathlib import Path

from hypervisor.ext.stats_sampler import Sources

__all__ = ["ONLY_V2", "ROOT", "Groups", "pressure_is_kept"]

ROOT = Path("/sys/fs/cgroup")
ONLY_V2 = (ROOT / "cgroup.controllers").is_file()
"""Whether there is version 2 alone."""
V1_CONTROLLERS = ("cpuacct", "cpu", "memory", "blkio", "pids")


def pressure_is_kept() -> bool:
    """Whether this kernel tells the pressure of control groups, in version 2 or in the unified half of a hybrid."""
    with suppress(OSError):
        return bool(Path("/proc/pressure/cpu").read_text()) and any(
            (root / "cgroup.procs").is_file() for root in (ROOT, ROOT / "unified")
        )
    return False


class Groups:
    """Control groups below one of the test's own, in every hierarchy there is."""

    def __init__(self, name: str) -> None:
        hierarchies = (ROOT,) if ONLY_V2 else (*(ROOT / c for c in V1_CONTROLLERS), ROOT / "unified")
        self._tops = [hierarchy / name for hierarchy in hierarchies if hierarchy.is_dir()]
        self._made: set[Path] = set()
        for top in self._tops:
            self._make(top)
        if ONLY_V2:
            (ROOT / "cgroup.subtree_control").write_text("+cpu +memory +io +pids")
            (self._tops[0] / "cgroup.subtree_control").write_text("+cpu +memory +io +pids")

    def _make(self, directory: Path) -> None:
        directory.mkdir()
        self._made.add(directory)

    def make(self, name: str) -> Sources:
        """Make a group; the sources of its figures."""
        for top in self._tops:
            self._make(top / name)
        if ONLY_V2:
            return Sources(cgroup2=self._tops[0] / name)
        v1 = {top.parent.name: top / name for top in self._tops if top.parent.name != "unified"}
        unified = next((top / name for top in self._tops if top.parent.name == "unified"), None)
        return Sources(cgroup1=v1, cgroup2=unified)

    def join(self, name: str, pid: int) -> None:
        """Move a process into a group."""
        for top in self._tops:
            (top / name / "cgroup.procs").write_text(str(pid))

    def limit_memory(self, name: str, size: int) -> None:
        """Give a group no more memory than that, and nothing beside it to swap to."""
        if ONLY_V2:
            (self._tops[0] / name / "memory.max").write_text(str(size))
            swap = self._tops[0] / name / "memory.swap.max"
            if swap.is_file():
                swap.write_text("0")
            return
        (self._of("memory") / name / "memory.limit_in_bytes").write_text(str(size))
        swap = self._of("memory") / name / "memory.memsw.limit_in_bytes"
        if swap.is_file():
            swap.write_text(str(size))

    def limit_processor(self, name: str, *, quota_us: int, period_us: int) -> None:
        """Let the processes of a group run for so much of each period."""
        if ONLY_V2:
            (self._tops[0] / name / "cpu.max").write_text(f"{quota_us} {period_us}")
            return
        (self._of("cpu") / name / "cpu.cfs_period_us").write_text(str(period_us))
        (self._of("cpu") / name / "cpu.cfs_quota_us").write_text(str(quota_us))

    def _of(self, controller: str) -> Path:
        return next(top for top in self._tops if top.parent.name == controller)

    def remove(self, name: str) -> None:
        """Remove a group that has no processes."""
        for top in self._tops:
            (top / name).rmdir()
            self._made.discard(top / name)

    def close(self) -> None:
        """Remove all of them."""
        for directory in sorted(self._made, reverse=True):
            directory.rmdir()
