"""QEMU as a VMM where it needs root: users of its own, and a disk that is full."""

import os
import subprocess
from pathlib import Path

import pytest

from hvtest_qemu_microvms import lacking
from hvtest_vmm_process import VmmProcess
from hypervisor.agent.drivers.microvm.qemu import QemuVmm
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import ResourceExhausted
from hypervisor.core.machines import SnapshotKind

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


@pytest.fixture
def vmm() -> QemuVmm:
    return QemuVmm(Path("qemu-system-x86_64"), Accelerator.TCG, clock=SystemClock())


def state_directory(guest: VmmProcess) -> Path:
    path = guest.directory / "state"
    path.mkdir(mode=0o700)
    return path


def mount(*command: str) -> None:
    subprocess.run(command, check=True)


async def test_a_state_that_does_not_fit_leaves_nothing_and_the_guest_goes_on(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        await guest.start()
        await guest.until_ready()
        directory = state_directory(guest)
        await vmm.pause(guest.machine)
        mount("mount", "-t", "tmpfs", "-o", "size=3M", "none", str(directory))
        try:
            for _ in range(2):
                with pytest.raises(ResourceExhausted) as caught:
                    await vmm.save(guest.machine, directory, kind=SnapshotKind.FULL)
                assert caught.value.reason == "DISK_FULL"
                assert os.listdir(directory) == []
        finally:
            # Lazily: QEMU keeps the file, which is gone, until its guest runs.
            mount("umount", "--lazy", str(directory))

        await vmm.resume(guest.machine)
        assert await guest.answer("echo on") == "on"


def process_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


async def test_a_guest_of_a_user_of_its_own_runs_as_that_user(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm, uid=2_000_123, disk_bytes=1 << 20) as guest:
        await guest.start()
        await guest.until_ready()
        status = process_status(guest.run.pid)
        directory = state_directory(guest)
        await vmm.pause(guest.machine)
        await vmm.save(guest.machine, directory, kind=SnapshotKind.FULL)

        assert status["Uid"].split() == status["Gid"].split() == ["2000123"] * 4
        assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == ("0" * 16, "1", "2")
