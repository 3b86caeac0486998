"""The bare side of benchmarks of virtual machines: virsh, and QEMU started by a script, with the small Linux guest."""

import os
import subprocess
import time

from hvtest_guests import KERNEL_ARGS, linux_guest
from hvtest_libvirtd import PrivateLibvirtd
from hvtest_vms import MEMORY_MB

__all__ = ["READY", "Bare"]

READY = b"READY"

DEFINITION = """\
<domain type='qemu'><name>bare</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{arguments}</cmdline></os><features><acpi/><apic/></features><cpu mode='maximum'/>
<devices><controller type='usb' model='none'/><memballoon model='none'/>
<serial type='pipe'><source path='{console}'/></serial></devices></domain>
"""


def until_ready(fd: int) -> None:
    """Read until the guest is ready."""
    seen = b""
    while READY not in seen:
        more = os.read(fd, 4096)
        assert more, seen
        seen += more


class Bare:
    """virsh and QEMU with the same guest."""

    def __init__(self, libvirtd: PrivateLibvirtd) -> None:
        self._libvirtd = libvirtd
        self._console = libvirtd.directory / "bare"
        self._guest = linux_guest()
        for way in ("in", "out"):
            os.mkfifo(f"{self._console}.{way}")
        self._definition = libvirtd.directory / "bare.xml"
        self._definition.write_text(
            DEFINITION.format(
                memory=MEMORY_MB,
                kernel=self._guest.kernel,
                initrd=self._guest.initrd,
                arguments=KERNEL_ARGS,
                console=self._console,
            )
        )

    def virsh(self) -> float:
        """Seconds from the definition to the guest's word."""
        fd = os.open(f"{self._console}.out", os.O_RDONLY | os.O_NONBLOCK)
        begin = time.perf_counter()
        self._libvirtd.virsh("define", str(self._definition))
        self._libvirtd.virsh("start", "bare")
        os.set_blocking(fd, True)
        until_ready(fd)
        took = time.perf_counter() - begin
        self._libvirtd.virsh("destroy", "bare")
        self._libvirtd.virsh("undefine", "bare")
        os.close(fd)
        return took

    def qemu(self) -> float:
        """Seconds from QEMU's start to the guest's word."""
        begin = time.perf_counter()
        process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", str(MEMORY_MB)),
                *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
                *("-kernel", str(self._guest.kernel), "-initrd", str(self._guest.initrd)),
                *("-append", KERNEL_ARGS),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        until_ready(process.stdout.fileno())
        took = time.perf_counter() - begin
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
        return took
