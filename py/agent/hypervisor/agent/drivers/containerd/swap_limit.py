"""No swap for a container: in the runtime specification with cgroup v1, in the control group itself with v2.

Whether a kernel accounts for swap is told by v2 in control groups below the root alone, and there may be none yet. runc
up to 1.1 fails where it does not, so with v2 the specification has no limit, and the driver sets it before the start.
"""

from contextlib import suppress
from pathlib import Path

from hypervisor.agent.stats.cgroups import CgroupPaths, uses_v2

__all__ = ["forbid_swap", "specification_limits_swap"]


def specification_limits_swap(root: Path) -> bool:
    """Whether the runtime specification may have a limit of memory and swap: v1, where the kernel accounts for swap."""
    return not uses_v2(root) and (root / "memory" / "memory.memsw.limit_in_bytes").is_file()


def forbid_swap(paths: CgroupPaths) -> None:
    """Let a control group of v2 have no swap, where the kernel accounts for it. Nothing for v1. Raises OSError."""
    if paths.unified is None:
        return
    # Not created where it does not exist: that is how a kernel says that it does not account for swap.
    with (
        suppress(FileNotFoundError),
        (paths.unified / "memory.swap.max").open("r+", encoding="ascii", buffering=1) as file,
    ):
        file.write("0")
