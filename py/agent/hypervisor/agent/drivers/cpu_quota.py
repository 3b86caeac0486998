"""The CPU quota of a container, set between the making of its process and its start.

In the runtime specification the quota would already hold back runc's own set-up inside the new control group: with a
twentieth of a core that alone takes longer than all the rest of a start. So the specification has none, and the driver
writes it while the process waits to be started. runc leaves what it has no value for alone, also in a later update.
"""

from dataclasses import dataclass
from pathlib import Path

from hypervisor.agent.stats.cgroups import CgroupPaths

__all__ = ["CpuLimit", "apply_cpu_limit", "cpu_limit"]

_PERIOD_US = 100_000
_MIN_QUOTA_US = 1_000
_MAX_PERIOD_US = 1_000_000
_MIN_SHARES = 2
_MAX_SHARES = 262_144


@dataclass(frozen=True, slots=True)
class CpuLimit:
    """CFS bandwidth and weight: at most ``quota_us`` of each ``period_us``."""

    quota_us: int
    period_us: int
    shares: int


def cpu_limit(cpu_millis: int) -> CpuLimit:
    """The limit for thousandths of a core. The kernel refuses quotas under 1 ms, so tiny ones get a longer period."""
    shares = min(_MAX_SHARES, max(_MIN_SHARES, cpu_millis * 1024 // 1000))
    quota = cpu_millis * _PERIOD_US // 1000
    if quota >= _MIN_QUOTA_US:
        return CpuLimit(quota, _PERIOD_US, shares)
    return CpuLimit(_MIN_QUOTA_US, min(_MAX_PERIOD_US, _MIN_QUOTA_US * 1000 // max(1, cpu_millis)), shares)


def apply_cpu_limit(paths: CgroupPaths, limit: CpuLimit) -> None:
    """Write the quota into a control group. A few microseconds; raises OSError, also where there is no controller."""
    if paths.unified is not None:
        _write(paths.unified / "cpu.max", f"{limit.quota_us} {limit.period_us}")
        return
    directory = paths.controllers.get("cpu")
    if directory is None:
        raise FileNotFoundError("the control group has no cpu controller")
    # The quota last: a period changed under a quota could make a limit the kernel refuses.
    _write(directory / "cpu.cfs_period_us", str(limit.period_us))
    _write(directory / "cpu.cfs_quota_us", str(limit.quota_us))


def _write(path: Path, value: str) -> None:
    # Not created where it does not exist: on a plain file system that would hide a missing controller.
    with path.open("r+", encoding="ascii", buffering=1) as file:
        file.write(value)
