"""QEMU as a VMM, for real: a Linux guest under TCG, without the driver around it. Each test boots one, once."""

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from hvtest_vmm_process import VmmProcess
from hypervisor.agent.drivers.microvm.qemu import QemuVmm
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator
from hypervisor.agent.drivers.microvm.vmm import KERNEL, Machine, Run, SavedState, VmmPhase
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import (
    FailedPrecondition,
    HypervisorError,
    InvalidArgument,
    Unavailable,
    Unimplemented,
)
from hypervisor.core.machines import MicrovmOptions, RateLimit, SnapshotKind

QEMU = Path("qemu-system-x86_64")


def make(program: Path = QEMU, accelerator: Accelerator = Accelerator.TCG) -> QemuVmm:
    return QemuVmm(program, accelerator, clock=SystemClock())


@pytest.fixture
def vmm() -> QemuVmm:
    return make()


def state_directory(guest: VmmProcess) -> Path:
    path = guest.directory / "state"
    path.mkdir(mode=0o700)
    return path


async def test_a_guest_runs_answers_pauses_and_ends_when_it_is_asked_to(vmm: QemuVmm) -> None:
    options = MicrovmOptions(balloon=True, disk_limit=RateLimit(operations_per_second=1000))
    async with VmmProcess(vmm, disk_bytes=3 << 20, options=options) as guest:
        await guest.start()
        printed = await guest.until_printed(b"READY")
        await guest.until_printed(b"# ")

        assert b"SeaBIOS" not in printed, "the firmware uses the guest's console, and takes what is typed"
        assert await vmm.phase(guest.machine) is VmmPhase.RUNNING
        assert await guest.answer("cat /sys/block/vda/size") == str((3 << 20) // 512)
        assert await guest.answer("dd if=/dev/zero of=/dev/vda bs=4096 count=2 2>/dev/null; echo $?") == "0"

        await vmm.pause(guest.machine)
        await vmm.pause(guest.machine)
        assert await vmm.phase(guest.machine) is VmmPhase.PAUSED

        await vmm.resume(guest.machine)
        await vmm.resume(guest.machine)
        assert await vmm.phase(guest.machine) is VmmPhase.RUNNING
        assert await guest.answer("echo $((6*7))") == "42"

        assert await vmm.ask_to_stop(guest.machine)
        code = await guest.ended()
        assert (vmm.end_of(guest.machine, code).crashed, code) == (False, 0)
        # As an agent sees it that has not started the process.
        assert not vmm.end_of(guest.machine, None).crashed
        with pytest.raises(Unavailable) as caught:
            await vmm.phase(guest.machine)
        assert caught.value.reason == "VMM_UNREACHABLE"


async def test_a_saved_guest_goes_on_where_it_was_more_than_once(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        await guest.start()
        await guest.until_ready()
        await guest.answer("word=kept; mkdir /tmp/a")
        directory = state_directory(guest)
        await vmm.pause(guest.machine)
        await vmm.save(guest.machine, directory, kind=SnapshotKind.FULL)

        assert await vmm.phase(guest.machine) is VmmPhase.PAUSED
        await vmm.resume(guest.machine)
        assert await guest.answer("echo $word; rmdir /tmp/a; word=lost") == "kept"
        await guest.kill()

        for _ in range(2):
            await guest.start(SavedState(directory=directory))
            assert await vmm.phase(guest.machine) is VmmPhase.RUNNING
            assert await guest.answer("echo $word; rmdir /tmp/a; word=lost") == "kept"
            await guest.kill()


async def test_conversations_at_the_same_time_wait_for_one_another_and_a_broken_one_is_tidied_up(
    vmm: QemuVmm,
) -> None:
    async with VmmProcess(vmm) as guest:
        await guest.start()
        await guest.until_ready()
        directory = state_directory(guest)
        await vmm.pause(guest.machine)
        saving = asyncio.ensure_future(vmm.save(guest.machine, directory, kind=SnapshotKind.FULL))
        phases = await asyncio.gather(*(vmm.phase(guest.machine) for _ in range(8)))
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
        if saving.cancelled():
            assert os.listdir(directory) == []

        await vmm.save(guest.machine, directory, kind=SnapshotKind.FULL)

        assert set(phases) == {VmmPhase.PAUSED}
        assert os.listdir(directory) == ["state.qcow2"]
        await vmm.resume(guest.machine)
        assert await guest.answer("echo on") == "on"


async def test_a_guest_that_was_saved_paused_stays_so_until_it_is_resumed(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        await guest.spawn()
        assert await phase_once_it_listens(vmm, guest) is VmmPhase.STARTING
        await vmm.boot(guest.machine, guest.run)
        await guest.until_ready()
        directory = state_directory(guest)
        await vmm.pause(guest.machine)
        await vmm.save(guest.machine, directory, kind=SnapshotKind.FULL)
        # Again over the same, as after an agent that died in between.
        await vmm.save(guest.machine, directory, kind=SnapshotKind.FULL)
        await guest.kill()

        await guest.start(SavedState(directory=directory, paused=True))

        assert await vmm.phase(guest.machine) is VmmPhase.PAUSED
        await vmm.resume(guest.machine)
        assert await vmm.phase(guest.machine) is VmmPhase.RUNNING
        assert await guest.answer("echo on") == "on"
        await vmm.pause(guest.machine)
        assert await vmm.phase(guest.machine) is VmmPhase.PAUSED


async def phase_once_it_listens(vmm: QemuVmm, guest: VmmProcess) -> VmmPhase:
    async with asyncio.timeout(30):
        while True:
            try:
                return await vmm.phase(guest.machine)
            except Unavailable:
                await asyncio.sleep(0.02)


async def test_a_panic_is_a_crash_with_the_reason(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm, kernel_args='GUEST_RUN="exit 7" GUEST_ON_ERROR=panic') as guest:
        await guest.start()

        code = await guest.ended(timeout_s=60)

        for known in (code, None):
            end = vmm.end_of(guest.machine, known)
            assert end.crashed
            assert "panicked" in end.message


async def test_a_qemu_that_is_killed_is_a_crash_with_the_reason(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        await guest.start()
        await guest.kill()

        end = vmm.end_of(guest.machine, await guest.ended())

        assert (end.crashed, end.message) == (True, "QEMU was ended by SIGKILL")
        assert vmm.end_of(guest.machine, None).crashed


async def test_what_the_kernel_is_told_arrives_as_it_was_written(vmm: QemuVmm) -> None:
    words = "a,b=c,,d -snapshot x=$(id);`id` y='z\\"
    async with VmmProcess(vmm, kernel_args=words) as guest:
        await guest.start()
        await guest.until_ready()

        assert (await guest.answer("cat /proc/cmdline")).endswith(words)


async def test_a_kernel_that_is_none_is_told_in_qemus_words(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        (vmm.root(guest.directory) / KERNEL).write_bytes(b"no kernel" * 1000)
        await guest.spawn()

        code = await guest.ended()

        end = vmm.end_of(guest.machine, code)
        assert end.crashed
        assert "kernel" in end.message


async def test_another_process_at_the_socket_is_not_taken_for_ours(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        await guest.spawn()

        with pytest.raises(Unavailable, match="another process listens"):
            await vmm.boot(guest.machine, Run(os.getpid(), 0, ""))


async def test_a_state_that_is_gone_or_damaged_is_refused(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        directory = state_directory(guest)
        await guest.spawn()
        with pytest.raises(FailedPrecondition) as gone:
            await vmm.boot(guest.machine, guest.run, SavedState(directory=directory))
        (directory / "state.qcow2").write_bytes(b"damaged" * 100)
        with pytest.raises(FailedPrecondition) as damaged:
            await vmm.boot(guest.machine, guest.run, SavedState(directory=directory))

        assert (gone.value.reason, damaged.value.reason) == ("STATE_LOST", "VMM_REFUSED")


async def test_a_state_of_changes_only_is_not_there(vmm: QemuVmm) -> None:
    async with VmmProcess(vmm) as guest:
        with pytest.raises(Unimplemented) as caught:
            await vmm.save(guest.machine, state_directory(guest), kind=SnapshotKind.DIFF)

    assert caught.value.reason == "CAPABILITY_MISSING"
    assert "snapshot-diff" in vmm.lacks


def test_states_work_on_the_loop_that_the_agent_runs_on(vmm: QemuVmm) -> None:
    async def save() -> None:
        async with VmmProcess(vmm) as guest:
            await guest.start()
            directory = state_directory(guest)
            await vmm.pause(guest.machine)
            await vmm.save(guest.machine, directory, kind=SnapshotKind.FULL)
            assert (directory / "state.qcow2").stat().st_size > 1 << 20

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(save())


# -- without a guest --------------------------------------------------------------------------------------------------


async def test_the_version_is_that_of_the_program(vmm: QemuVmm) -> None:
    version = await vmm.version()

    assert version.startswith("qemu ")
    assert version.endswith(" (tcg)")
    assert (vmm.key, make(accelerator=Accelerator.KVM).key) == ("qemu-tcg", "qemu-kvm")


@pytest.mark.parametrize("text", ["exit 0", "echo hello", "echo QEMU emulator version 7; exit 3", "yes"])
async def test_a_program_that_is_no_qemu_is_unavailable(tmp_path: Path, text: str) -> None:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{text.replace('yes', 'head -c 100000 /dev/zero')}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

    with pytest.raises(Unavailable, match="does not answer as QEMU does") as caught:
        await make(path).version()

    assert caught.value.reason == "DRIVER_UNAVAILABLE"


@pytest.mark.parametrize("call", [lambda v, m: v.version(), lambda v, m: v.launch(m)])
async def test_no_qemu_is_unavailable_with_what_to_install(
    tmp_path: Path, call: Callable[[QemuVmm, Machine], asyncio.Future[object]]
) -> None:
    machine = Machine(instance_id="i", directory=tmp_path, run_dir=tmp_path, vcpus=1, memory_mib=64)

    with pytest.raises(Unavailable, match="apt-get install qemu-system-x86"):
        await call(make(tmp_path / "absent"), machine)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (MicrovmOptions(metadata="{}"), "spec.microvm.metadata"),
        (MicrovmOptions(network_limit=RateLimit(bytes_per_second=1)), "spec.microvm.network_limit"),
    ],
)
def test_what_only_firecracker_has_is_refused_by_name(
    vmm: QemuVmm, tmp_path: Path, options: MicrovmOptions, field: str
) -> None:
    (vmm.root(tmp_path)).mkdir()
    machine = Machine(
        instance_id="i", directory=tmp_path, run_dir=tmp_path, vcpus=1, memory_mib=64, options=options
    )

    with pytest.raises(InvalidArgument) as caught:
        vmm.check(machine)

    assert isinstance(caught.value, HypervisorError)
    assert [violation.field for violation in caught.value.violations] == [field]
