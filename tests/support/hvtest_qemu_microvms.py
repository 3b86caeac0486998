"""The microVM driver over the real QEMU (by TCG) and the small Linux guest: what its tests share."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from hvtest_agent_waiting import within
from hvtest_driver_watching import read_until
from hvtest_guests import KERNEL_ARGS, linux_guest
from hypervisor.agent.drivers.driver import Assignment, Driver, Handle
from hypervisor.agent.drivers.microvm import MicrovmConfig, MicrovmDriver
from hypervisor.agent.drivers.microvm.control_groups import ControlGroups
from hypervisor.agent.drivers.microvm.processes import processes_of
from hypervisor.agent.drivers.microvm.qemu import QemuVmm
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions, NetworkInterface, VmmChoice
from hypervisor.core.model import InstanceSpec, Observation
from hypervisor.core.states import InstanceStatus, InstanceType

__all__ = ["QemuBench", "ReadyDriver", "lacking", "start_ready", "until_ready"]

_QEMU = Path("qemu-system-x86_64")
_READY = b"READY"
_PROMPT = b"# "


def lacking() -> str:
    """Why tests with the real QEMU cannot run here; empty when they can."""
    if shutil.which(_QEMU) is None:
        return f"{_QEMU} is not there: apt-get install qemu-system-x86"
    if os.geteuid() != 0:
        return "it needs root rights, for control groups and users of its own"
    return ""


async def start_ready(driver: Driver, instance_id: str) -> Observation:
    """Start it, and return when its shell can be typed to: what is typed before a kernel has its serial port is lost,
    as on a real one."""
    seen = await driver.start(instance_id)
    await until_ready(driver, instance_id)
    return seen


async def until_ready(driver: Driver, instance_id: str) -> None:
    """Return when its shell has shown its prompt."""
    console = await driver.attach(instance_id)
    seen = await read_until(console, _READY)
    while _PROMPT not in seen.partition(_READY)[2]:
        seen += await within(console.read(), what="the shell shows its prompt")
    await console.close()


class ReadyDriver(MicrovmDriver):
    """The driver, whose guests with a shell are started when that can be typed to, as the contract's tests take it."""

    _shells: frozenset[str] = frozenset()

    async def create(self, assignment: Assignment) -> Handle:
        handle = await super().create(assignment)
        if "GUEST_RUN" not in assignment.spec.kernel_args:
            self._shells |= {assignment.instance_id}
        return handle

    async def start(self, instance_id: str) -> Observation:
        fresh = instance_id in self._shells
        if fresh:
            before = await self.get(instance_id)
            fresh = before.status is not InstanceStatus.RUNNING and before.reason != "SUSPENDED"
        if not fresh:
            return await super().start(instance_id)
        seen = await super().start(instance_id)
        await until_ready(self, instance_id)
        return seen


class QemuBench:
    """Directories of one node, and drivers over them (``DriverBench``). For ``with``: it ends what is left."""

    kind = InstanceType.MICROVM

    def __init__(self, *, bridges: tuple[str, ...] = (), jail: bool = True) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hv-q-", dir=os.environ.get("TEST_TMPDIR")))
        self.images = self.directory / "images"
        self.images.mkdir()
        guest = linux_guest()
        self.kernel, self.initrd = self.images / "vmlinuz", self.images / "initrd.img"
        shutil.copyfile(guest.kernel, self.kernel)
        shutil.copyfile(guest.initrd, self.initrd)
        self.config = MicrovmConfig(
            data_dir=self.directory / "data",
            run_dir=Path(tempfile.mkdtemp(prefix="hv-q-", dir="/tmp")),
            roots=(self.images,),
            bridges=bridges,
            vmm=VmmChoice.QEMU,
            jail=jail,
            cgroup=f"hypervisor-test-{self.directory.name}",
        )

    def __enter__(self) -> "QemuBench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for run in tuple(processes_of(self.directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.pid, 9)
        groups = ControlGroups(self.config.cgroup_root, self.config.cgroup)
        for name in groups.names():
            groups.remove(name)
        groups.remove("")
        shutil.rmtree(self.directory)
        shutil.rmtree(self.config.run_dir)

    def vmm(self, accelerator: Accelerator = Accelerator.TCG) -> QemuVmm:
        """QEMU by TCG, which runs guests everywhere, or by another accelerator."""
        return QemuVmm(_QEMU, accelerator, clock=SystemClock())

    async def open(self) -> Driver:
        """A driver, as an agent that starts makes one, but see :class:`ReadyDriver`."""
        return ReadyDriver(self.config, (self.vmm(),), clock=SystemClock(), new_id=new_id)

    def driver(self) -> MicrovmDriver:
        """A driver, as an agent that starts makes one."""
        return MicrovmDriver(self.config, (self.vmm(),), clock=SystemClock(), new_id=new_id)

    def spec(
        self,
        *,
        arguments: str = "",
        memory_mb: int = 128,
        disk_gb: int = 0,
        networks: tuple[NetworkInterface, ...] = (),
        options: MicrovmOptions | None = None,
    ) -> InstanceSpec:
        """The small Linux guest; see hypervisor.ctl.guest_image for the arguments it knows."""
        return InstanceSpec(
            kernel_path=str(self.kernel),
            initrd_path=str(self.initrd),
            kernel_args=f"{KERNEL_ARGS} {arguments}".strip(),
            memory_mb=memory_mb,
            disk_gb=disk_gb,
            networks=networks,
            microvm=options,
        )

    def shell(self) -> InstanceSpec:
        return self.spec()

    def exits(self, code: int) -> InstanceSpec:
        return self.spec(arguments=f'GUEST_RUN="exit {code}" GUEST_ON_ERROR=panic')

    def prints(self, text: str) -> InstanceSpec:
        return self.spec(arguments=f'GUEST_RUN="echo {text}"')

    def missing_image(self) -> InstanceSpec:
        return InstanceSpec(kernel_path=str(self.images / "absent"), memory_mb=64)

    def invalid_image(self) -> InstanceSpec:
        path = self.images / "invalid"
        path.write_bytes(b"this is no kernel" * 100)
        return InstanceSpec(kernel_path=str(path), memory_mb=64)

    def leftovers(self) -> dict[str, list[str]]:
        """Files, processes and control groups."""
        found = {
            "files": [
                str(path)
                for base in (self.config.data_dir / "instances", self.config.run_dir)
                for path in base.glob("*")
            ],
            "processes": [str(run.pid) for run in processes_of(self.directory)],
            "control groups": list(ControlGroups(self.config.cgroup_root, self.config.cgroup).names()),
        }
        return {kind: names for kind, names in found.items() if names}
