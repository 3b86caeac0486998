"""What the containerd driver has to be told."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ContainerdConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerdConfig:
    """Settings of the containerd driver; all of them have to stay the same for as long as it has containers."""

    address: Path = Path("/run/containerd/containerd.sock")
    """containerd's unix socket."""
    namespace: str = "hypervisor"
    """containerd namespace that holds images and containers of ours, and first part of their cgroup paths."""
    snapshotter: str = "overlayfs"
    """Which snapshotter holds file systems."""
    runtime: str = "io.containerd.runc.v2"
    """Which shim runs containers."""
    console_root: Path = Path("/run/hypervisor/consoles")
    """Private directory for the FIFOs of consoles; has to survive the agent, not the machine."""
    console_buffer_bytes: int = 1 << 20
    """Console output the kernel keeps for a container while no agent reads it; past that, its writes wait."""
    archive_roots: tuple[Path, ...] = ()
    """Directories from which ``oci-archive:`` images may be imported. None: importing is refused."""
    cgroup_root: Path = Path("/sys/fs/cgroup")
    """Where control groups are mounted."""
    proc_root: Path = Path("/proc")
    """Where the proc file system is mounted."""
    rpc_timeout_s: float = 30.0
    """Deadline of an ordinary call to containerd."""
    image_timeout_s: float = 600.0
    """Deadline of a call that writes or unpacks a layer."""
