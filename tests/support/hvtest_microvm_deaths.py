"""An agent that dies in the middle of something it does with a microVM: the driver in a process of its own, which kills
itself at the step that is named.

Its program takes one argument, which `die_while` makes.
"""

import asyncio
import base64
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

from hypervisor.agent.drivers.microvm import MicrovmConfig, MicrovmDriver
from hypervisor.agent.drivers.microvm.records import Record, RecordStore
from hypervisor.agent.drivers.microvm.runner import Runner
from hypervisor.agent.drivers.microvm.tracking import Tracker
from hypervisor.agent.drivers.microvm.vmm import Vmm
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id

__all__ = ["die_while"]


def die_while(verb: str, step: str, instance_id: str, *, config: MicrovmConfig, vmm: Vmm) -> None:
    """Have an agent start or suspend (``verb``) the instance and die at the step.

    Steps of a start: ``unrecorded`` (the process is there and not recorded), ``loading``, ``loaded``, ``going on``
    (recorded, not yet done), ``running`` (done, not yet recorded), ``recorded`` (what was saved is there still).
    Of a suspend: ``saved`` (recorded, the guest paused).
    """
    what = base64.b64encode(pickle.dumps((config, vmm.__class__, _arguments(vmm), verb, step, instance_id)))
    done = subprocess.run(
        [sys.executable, "-m", "hvtest_microvm_deaths", what.decode()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, f"it did not die at {step!r}: {done.returncode}"


def _arguments(vmm: Vmm) -> tuple[object, ...]:
    from hypervisor.agent.drivers.microvm.qemu import QemuVmm
    from hypervisor.agent.drivers.microvm.qemu_command import Accelerator

    if isinstance(vmm, QemuVmm):
        return (Path("qemu-system-x86_64"), Accelerator.TCG)
    from hvtest_microvms import FIRECRACKER, JAILER

    return (FIRECRACKER, JAILER)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _deadly(vmm: Vmm, step: str) -> None:
    """Let the process die before or after what the VMM does, or what is recorded of it."""
    boot, resume, save, kill, forget = (
        vmm.boot,
        vmm.resume,
        RecordStore.save,
        Runner.kill,
        Tracker.forget_memory,
    )

    async def booted(*arguments: object) -> None:
        if step == "loading":
            _die()
        await boot(*arguments)  # type: ignore[arg-type]
        if step == "loaded":
            _die()

    async def resumed(*arguments: object) -> None:
        if step == "going on":
            _die()
        await resume(*arguments)  # type: ignore[arg-type]
        if step == "running":
            _die()

    def saved(self: RecordStore, record: Record) -> None:
        if step == "unrecorded" and record.run is not None:
            _die()
        save(self, record)

    async def killed(self: Runner, *arguments: object) -> None:
        if step == "saved":
            _die()
        await kill(self, *arguments)  # type: ignore[arg-type]

    async def forgotten(self: Tracker, *arguments: object) -> None:
        if step == "recorded":
            _die()
        await forget(self, *arguments)  # type: ignore[arg-type]

    for owner, name, deadly in (
        (vmm, "boot", booted),
        (vmm, "resume", resumed),
        (RecordStore, "save", saved),
        (Runner, "kill", killed),
        (Tracker, "forget_memory", forgotten),
    ):
        setattr(owner, name, deadly)


async def _main() -> None:
    config, kind, arguments, verb, step, instance_id = pickle.loads(base64.b64decode(sys.argv[1]))
    if kind.__name__ == "QemuVmm":
        vmm = kind(*arguments, clock=SystemClock())
    else:
        vmm = kind(arguments[0], jailer=arguments[1] if config.jail else None, clock=SystemClock())
    _deadly(vmm, step)
    driver = MicrovmDriver(config, (vmm,), clock=SystemClock(), new_id=new_id)
    await getattr(driver, verb)(instance_id)


if __name__ == "__main__":
    asyncio.run(_main())
