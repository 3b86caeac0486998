"""What the microVM driver has to be told."""

import os
from dataclasses import dataclass
from pathlib import Path

from hypervisor.core.machines import VmmChoice

__all__ = ["MicrovmConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrovmConfig:
    """Settings of the driver; the directories have to stay the same for as long as it has microVMs."""

    data_dir: Path
    """Records, disks, snapshots and jails: one directory for each instance."""
    run_dir: Path
    """FIFOs and sockets; a short path that has to survive the agent, not the machine."""
    roots: tuple[Path, ...] = ()
    """Where kernels, initial RAM disks and images given by path may be."""
    bridges: tuple[str, ...] = ()
    """Bridges that network cards may be plugged into."""
    kernel: Path | None = None
    """Kernel of microVMs whose specification names none, and of the boot probe."""
    vmm: VmmChoice = VmmChoice.AUTO
    probe_timeout_s: float = 20.0
    jail: bool = True
    """Give each instance a user of its own and its VMM a jail, where the agent runs as root."""
    first_uid: int = 2_000_000
    uids: int = 65_536
    cgroup: str = "hypervisor-microvms"
    """Control group, in each hierarchy, that holds one for each VMM."""
    cgroup_root: Path = Path("/sys/fs/cgroup")
    proc_root: Path = Path("/proc")
    console_buffer_bytes: int = 1 << 20
    """Console output the kernel keeps for an instance while no agent reads it; past that, the guest waits."""
    boot_timeout_s: float = 30.0
    """How long a VMM may take from its start until its guest runs."""
    starts_at_once: int = max(8, 4 * (os.cpu_count() or 1))
    """Starts under way at the same time; others wait. More would only slow each other down until all are late, and some
    too late. A start is half waiting (for the kernel, for a process to come up), so there are more than cores."""
