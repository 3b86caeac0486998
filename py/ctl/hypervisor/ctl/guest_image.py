"""Makes a small Linux guest for virtual machines and microVMs of what Debian has installed: for the demo and tests.

A kernel (package linux-image-cloud-amd64) and an initial RAM disk with a static busybox, the modules of virtio devices
and an init that says READY and gives a shell on the console. No disk is needed. What the guest does can be chosen by
words on the kernel's command line, which the kernel hands to init as variables:

``GUEST_RUN="command"``     run this in place of the shell.
``GUEST_IP=10.0.0.2/24``    address of the first network card.
``GUEST_ON_ERROR=panic``    panic when the shell or the command ends with an error; else the guest powers off.

With ``reboot=k``, by which Firecracker's guests are booted, it resets itself in the place of powering off: there is no
power to switch there, and the reset ends the VMM.

The bytes of the RAM disk depend on its parts alone. Standard library only.
"""

import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypervisor.ctl.cpio import CpioWriter
from hypervisor.ctl.kernel_modules import KernelModules
from hypervisor.ctl.oci_image import BUSYBOX_APPLETS
from hypervisor.ctl.vmlinux import extract_vmlinux

__all__ = ["GUEST_MODULES", "Guest", "build_guest", "build_initrd", "find_kernel", "modules_of"]

_RELEASE = re.compile(r"vmlinuz-(?P<release>.+)")
_NUMBER = re.compile(r"(\d+)")

GUEST_MODULES = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "evdev",
    "button",
    "pvpanic_pci",
    "pvpanic_mmio",
    "isofs",
)
"""What a guest loads, besides what these need. Those that a kernel has not are left out."""
_ESSENTIAL = ("virtio_pci", "virtio_blk", "virtio_net")
_APPLETS = (
    "acpid",
    "cttyhack",
    "halt",
    "insmod",
    "lsmod",
    "mke2fs",
    "poweroff",
    "reboot",
    "route",
    "setsid",
    "switch_root",
    "udhcpc",
)

_INIT = """\
#!/bin/sh
export PATH=/bin HOME=/root TERM=vt102
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts && mount -t devpts pts /dev/pts
while read -r module; do
  insmod "/lib/modules/$module.ko" || echo "init: $module was not loaded"
done < /lib/modules/order
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
  [ -z "$GUEST_IP" ] || ip addr add "$GUEST_IP" dev eth0
  ip link set eth0 up
fi
[ ! -e /dev/input/event0 ] || acpid -l /dev/null -p /run/acpid.pid
# A serial line has no size, and programs that draw want one.
stty rows 24 cols 80
echo READY
if [ -n "$GUEST_RUN" ]; then
  sh -c "$GUEST_RUN"
else
  setsid cttyhack sh
fi
code=$?
sync
if [ "$code" -ne 0 ] && [ "$GUEST_ON_ERROR" = panic ]; then
  echo "init: ended with $code"
  echo c > /proc/sysrq-trigger
fi
case " $(cat /proc/cmdline) " in
  *" reboot=k "*) reboot -f ;;
  *) poweroff -f ;;
esac
"""
_POWER_BUTTON = """\
#!/bin/sh
sync
umount -a -r
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Guest:
    """Where the parts of a guest are."""

    kernel: Path
    initrd: Path
    vmlinux: Path | None = None
    """The kernel as Firecracker boots it, where it was asked for."""


def find_kernel(boot: Path = Path("/boot")) -> Path | None:
    """The newest kernel that is installed, one made for clouds before all others; None when there is none."""

    def rank(path: Path) -> tuple[bool, list[tuple[int, str]]]:
        parts = _NUMBER.split(path.name)
        return "-cloud-" in path.name, [(int(p), "") if p.isdigit() else (0, p) for p in parts]

    return max(boot.glob("vmlinuz-*"), key=rank, default=None)


def modules_of(kernel: Path, root: Path = Path("/lib/modules")) -> Path:
    """Where the modules of an installed kernel are, by its name ``vmlinuz-RELEASE``."""
    match = _RELEASE.fullmatch(kernel.name)
    return root / (match["release"] if match else kernel.name)


def build_guest(
    out: Path,
    *,
    kernel: Path,
    modules: Path,
    busybox: Path,
    wanted: Sequence[str] = GUEST_MODULES,
    vmlinux: bool = False,
) -> Guest:
    """Write ``vmlinuz`` and ``initrd.img`` to the directory ``out``, each whole or not at all; raises OSError.

    ``modules``: the directory of the kernel's modules. ``busybox``: a static one (Debian: busybox-static).
    ``vmlinux``: write ``vmlinux`` too, the kernel unpacked.
    """
    initrd = build_initrd(KernelModules(modules), busybox.read_bytes(), wanted=wanted)
    unpacked = extract_vmlinux(kernel.read_bytes()) if vmlinux else b""
    guest = Guest(out / "vmlinuz", out / "initrd.img", out / "vmlinux" if vmlinux else None)

    def copy(target: Path) -> None:
        shutil.copyfile(kernel, target)

    _write(guest.kernel, copy)
    _write(guest.initrd, lambda target: target.write_bytes(initrd))
    if guest.vmlinux is not None:
        _write(guest.vmlinux, lambda target: target.write_bytes(unpacked))
    return guest


def build_initrd(modules: KernelModules, busybox: bytes, *, wanted: Sequence[str] = GUEST_MODULES) -> bytes:
    """The initial RAM disk, compressed. Raises OSError for modules that are not there."""
    if lacking := modules.missing(name for name in wanted if name in _ESSENTIAL):
        raise OSError(f"the kernel has no module {', '.join(lacking)}, without which a guest has no devices")
    archive = CpioWriter()
    for name in ("bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "lib", "lib/modules", "mnt", "proc"):
        archive.directory(name)
    for name, mode in (("root", 0o700), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777), ("var", 0o755)):
        archive.directory(name, mode=mode)
    # The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", major=5, minor=1)
    archive.file("init", _INIT.encode(), mode=0o755)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file("etc/acpi/PWRF/00000080", _POWER_BUTTON.encode(), mode=0o755)
    archive.file("bin/busybox", busybox, mode=0o755)
    for applet in sorted({*BUSYBOX_APPLETS, *_APPLETS}):
        archive.link(f"bin/{applet}", "busybox")
    ordered = modules.in_order(wanted)
    for module in ordered:
        archive.file(f"lib/modules/{module.name}.ko", modules.read(module))
    archive.file("lib/modules/order", "".join(f"{module.name}\n" for module in ordered).encode())
    return gzip.compress(archive.finish(), compresslevel=6, mtime=0)


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        fill(temporary)
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise
    finally:
        os.close(descriptor)
