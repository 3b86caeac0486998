"""Claims: a virtual machine made by the agent's driver is ready within 1.1 times what `virsh define` and `virsh start`
take with the same kernel, and within 1.1 times what a bare QEMU takes that a script starts.

From the first call to READY on the guest's serial line, all emulated (TCG). Ours is the driver alone (vm_platform.py
has the platform around it): specification checked, kernel and RAM disk taken over, definition, start, and all the
devices it gives a machine. virsh gets a definition with the serial line and nothing else, on the same libvirtd; QEMU
runs without libvirt, on pipes. Machines are ended and removed outside the clock. Needs root, libvirtd and QEMU
(tools/setup).
"""

import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path

from measure import Reference, claim, interleave_all, publish, unmeasured
from measure_vms import READY, Bare

from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_vms import VmBench, vm_assignment

PAIRS = 8


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
