"""What the libvirt driver is told of its node."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["LibvirtConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtConfig:
    """``data_dir`` holds everything the driver makes and must be reachable for libvirt's QEMU."""

    uri: str
    data_dir: Path
    roots: tuple[Path, ...] = ()
    """Directories from which images, kernels and initial RAM disks given by path are taken."""
    bridges: tuple[str, ...] = ()
    host_devices: tuple[str, ...] = ()
    qemu_img: str = "qemu-img"
    probe_timeout_s: float = 6.0
    """How long a guest may take to boot by KVM before QEMU's own emulation is used instead."""
    console_buffer_bytes: int = 1 << 20
    """What a guest can print while nobody reads; past it the guest waits."""
    query_timeout_s: float = 8.0
    pci_root: Path = Path("/sys/bus/pci/devices")
    net_root: Path = Path("/sys/class/net")
    cgroup_root: Path = Path("/sys/fs/cgroup")
    qemu_logs: Path = Path("/var/log/libvirt/qemu")
    """Where libvirt keeps what QEMU says, a file for each instance."""

    @property
    def instances(self) -> Path:
        """One directory per instance: its disk and its seed."""
        return self.data_dir / "instances"

    @property
    def bases(self) -> Path:
        """Images, kernels and initial RAM disks that instances use, which nobody writes to."""
        return self.data_dir / "bases"

    @property
    def consoles(self) -> Path:
        """One directory per instance: the FIFOs of its console."""
        return self.data_dir / "consoles"
