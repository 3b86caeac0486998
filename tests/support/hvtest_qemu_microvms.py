"""The microVM driver over the real QEMU (by TCG) and the small Linux guest: what its tests share."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hvtest_agent_waiting import within
from hvtest_guests import KERNEL_ARGS, linux_guest
from hypervisor.agent.drivers.driver import Assignment, Console, Driver, Handle
from hypervisor.agent.drivers.microvm import MicrovmConfig, MicrovmDriver
from hypervisor.agent.drivers.microvm.control_groups import ControlGroups
from hypervisor.agent.drivers.microvm.processes import processes_in
from hypervisor.agent.drivers.microvm.qemu import QemuVmm
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator
from hypervisor.agent.drivers.microvm.vmm import Vmm
from hypervisor.core.clock import Clock, SystemClock
from hypervisor.core.ids import IdSource, new_id
from hypervisor.core.machines import MicrovmOptions, NetworkInterface, VmmChoice
from hypervisor.core.model import InstanceSpec, Observation
from hypervisor.core.states import InstanceStatus, InstanceType

__all__ = ["QemuBench", "ReadyDriver", "lacking", "start_ready"]

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
    console = await driver.attach(instance_id)
    await _until_prompt(console)
    await console.close()
    return seen


async def _until_prompt(console: Console) -> None:
    """Return when its shell has shown its prompt; nothing of it is left to be read."""
    seen = b""
    while _PROMPT not in seen.partition(_READY)[2]:
        data = await within(
            console.read(), what=f"the shell shows its prompt; seen: {seen!r}", timeout_s=60.0
        )
        assert data, f"the console ended before there was a prompt: {seen!r}"
        seen += data


class ReadyDriver(MicrovmDriver):
    """The driver as the contract's tests take it: the console of a guest with a shell is attached when that can be
    typed to. Tests that type nothing do not wait for a boot."""

    def __init__(self, config: MicrovmConfig, vmms: Sequence[Vmm], *, clock: Clock, new_id: IdSource) -> None:
        super().__init__(config, vmms, clock=clock, new_id=new_id)
        self._shells: set[str] = set()
        self._booting: set[str] = set()

    async def create(self, assignment: Assignment) -> Handle:
        handle = await super().create(assignment)
        if "GUEST_RUN" not in assignment.spec.kernel_args:
            self._shells.add(assignment.instance_id)
        return handle

    async def start(self, instance_id: str) -> Observation:
        before = await self.get(instance_id)
        seen = await super().start(instance_id)
        if before.status is not InstanceStatus.RUNNING and before.reason != "SUSPENDED":
            self._booting.add(instance_id)
        return seen

    async def attach(self, instance_id: str) -> Console:
        console = await super().attach(instance_id)
        if instance_id in self._booting & self._shells:
            await _until_prompt(console)
            self._booting.discard(instance_id)
        return console


class QemuBench:
    """Directories of one node, and drivers over them (``DriverBench``). For ``with``: it ends what is left."""

    kind = InstanceType.MICROVM

    def __init__(
        self,
        *,
        bridges: tuple[str, ...] = (),
        jail: bool = True,
        accelerator: Accelerator = Accelerator.TCG,
    ) -> None:
        self._accelerator = accelerator
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
        for run in tuple(processes_in((self.directory,))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.pid, 9)
        groups = ControlGroups(self.config.cgroup_root, self.config.cgroup)
        for name in groups.names():
            groups.remove(name)
        groups.remove("")
        shutil.rmtree(self.directory)
        shutil.rmtree(self.config.run_dir)

    def vmm(self, accelerator: Accelerator | None = None) -> QemuVmm:
        """QEMU by the bench's accelerator, or by another one; TCG runs guests everywhere."""
        return QemuVmm(_QEMU, accelerator or self._accelerator, clock=SystemClock())

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
            "processes": [str(run.pid) for run in processes_in((self.directory,))],
            "control groups": list(ControlGroups(self.config.cgroup_root, self.config.cgroup).names()),
        }
        return {kind: names for kind, names in found.items() if names}
