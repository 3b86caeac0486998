"""Claims: a virtual machine made by the agent's driver is ready within 1.1 times what `virsh define` and `virsh start`
take with the same kernel, and within 1.1 times what a bare QEMU takes that a script starts.

From the first call to READY on the guest's serial line, all emulated (TCG). Ours is the driver alone: specification
checked, kernel and RAM disk taken over, definition, start, and all the devices it gives a machine. virsh gets a
definition with the serial line and nothing else, on the same libvirtd; QEMU runs without libvirt, on pipes. Machines
are ended and removed outside the clock. Needs root, libvirtd and QEMU (tools/setup).
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Reference, claim, interleave_all, publish, unmeasured

from hvtest_guests import KERNEL_ARGS, linux_guest
from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_vms import MEMORY_MB, VmBench, vm_assignment

PAIRS = 8
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


def main() -> None:
    """Measure and publish."""
    names = ("define to READY, driver against virsh", "define to READY, driver against bare QEMU")
    missing = missing_for_libvirt()
    if missing:
        publish(
            [
                unmeasured(
                    name,
                    reference_name=reference,
                    better="less",
                    goal=1.1,
                    why=f"needs {', '.join(missing)}",
                )
                for name, reference in zip(names, ("virsh define, start", "QEMU"), strict=True)
            ]
        )
        return
    directory = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    with PrivateLibvirtd(directory) as libvirtd, asyncio.Runner() as runner:
        bench = VmBench(libvirtd)
        driver = runner.run(bench.open())
        bare = Bare(libvirtd)

        async def made() -> float:
            assignment = vm_assignment(bench.spec())
            begin = time.perf_counter()
            await driver.create(assignment)
            await driver.start(assignment.instance_id)
            console = await driver.attach(assignment.instance_id)
            seen = b""
            while READY not in seen:
                more = await console.read()
                assert more, seen
                seen += more
            took = time.perf_counter() - begin
            await driver.delete(assignment.instance_id)
            return took

        # Whether KVM works is found out once on a node, not with each machine.
        runner.run(driver.info())
        ours, virsh, qemu = interleave_all((lambda: runner.run(made()), bare.virsh, bare.qemu), pairs=PAIRS)
        runner.run(driver.aclose())
    shutil.rmtree(directory, ignore_errors=True)
    publish(
        [
            claim(
                name,
                ours,
                theirs,
                unit="s",
                reference_name=reference,
                better="less",
                goal=1.1,
                against=Reference.PEER,
            )
            for name, theirs, reference in zip(
                names, (virsh, qemu), ("virsh define, start", "QEMU"), strict=True
            )
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
