"""The microVM driver over the real Firecracker and the guest of a few kilobytes: what its tests share.

``HYPERVISOR_TEST_FIRECRACKER``, ``HYPERVISOR_TEST_JAILER`` and ``HYPERVISOR_TEST_GUEST`` are paths; by default they are
where `make dev` puts them.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from hvtest_driver_watching import read_until
from hypervisor.agent.drivers.driver import Assignment, Driver
from hypervisor.agent.drivers.microvm import FirecrackerVmm, MicrovmConfig, MicrovmDriver
from hypervisor.agent.drivers.microvm.control_groups import ControlGroups
from hypervisor.agent.drivers.microvm.processes import processes_in
from hypervisor.agent.drivers.microvm.records import RecordStore
from hypervisor.agent.drivers.microvm.vmm import Run
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions, VmmChoice
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType

__all__ = ["GUEST", "FirecrackerBench", "answer", "assignment", "missing", "pid_of", "root_of", "started"]

_SHARE = Path(sys.prefix) / "share"
FIRECRACKER = Path(os.environ.get("HYPERVISOR_TEST_FIRECRACKER", _SHARE / "firecracker/firecracker"))
JAILER = Path(os.environ.get("HYPERVISOR_TEST_JAILER", _SHARE / "firecracker/jailer"))
GUEST = Path(os.environ.get("HYPERVISOR_TEST_GUEST", _SHARE / "guest/guest.elf"))
"""See tests/support/guest/guest.c for the lines it obeys."""


def missing(*, root: bool = True) -> str:
    """Why tests with the real Firecracker cannot run here; empty when they can."""
    for path in (FIRECRACKER, JAILER, GUEST):
        if not path.exists():
            return f"{path} is not there: run `make dev`"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there is no /dev/kvm that may be used"
    if root and os.geteuid() != 0:
        return "it needs root rights, for jails and control groups"
    return ""


def assignment(spec: InstanceSpec, *, name: str = "micro", instance_id: str = "") -> Assignment:
    """A fresh microVM."""
    return Assignment(
        instance_id=instance_id or new_id("i"),
        name=name,
        project="default",
        type=InstanceType.MICROVM,
        spec=spec,
    )


class FirecrackerBench:
    """Directories of one node, and drivers over them (``DriverBench``). For ``with``: it ends what is left."""

    kind = InstanceType.MICROVM

    def __init__(self, *, jail: bool = True, bridges: tuple[str, ...] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hv-fc-", dir=os.environ.get("TEST_TMPDIR")))
        self.images = self.directory / "images"
        self.images.mkdir()
        self.kernel = self.images / "guest"
        shutil.copyfile(GUEST, self.kernel)
        self.config = MicrovmConfig(
            data_dir=self.directory / "data",
            run_dir=self.directory / "run",
            roots=(self.images,),
            bridges=bridges,
            vmm=VmmChoice.FIRECRACKER,
            jail=jail,
            # Others may be tested on the same machine.
            first_uid=1_000_000_000 + os.getpid() * 512,
            uids=512,
            cgroup=f"hypervisor-test-{self.directory.name}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for run in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.pid, 9)
        groups = ControlGroups(self.config.cgroup_root, self.config.cgroup)
        for name in groups.names():
            groups.remove(name)
        groups.remove_parent()
        shutil.rmtree(self.directory)

    def processes(self) -> tuple[Run, ...]:
        """Of this node, known to a driver or not."""
        uids = range(self.config.first_uid, self.config.first_uid + self.config.uids)
        return tuple(processes_in((self.directory,), uids=uids))

    def cpu_limits(self, instance_id: str) -> set[tuple[int, int]]:
        """Quota and period of an instance's control group, in microseconds."""
        paths = ControlGroups(self.config.cgroup_root, self.config.cgroup).paths(instance_id)
        if paths.unified is not None:
            quota, period = (paths.unified / "cpu.max").read_text("ascii").split()
            return {(int(quota), int(period))}
        directory = paths.controllers["cpu"]
        quota, period = (
            (directory / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period")
        )
        return {(int(quota), int(period))}

    def vmm(self) -> FirecrackerVmm:
        """Firecracker, as the configuration has it."""
        return FirecrackerVmm(FIRECRACKER, jailer=JAILER if self.config.jail else None, clock=SystemClock())

    async def open(self) -> Driver:
        """A driver, as an agent that starts makes one."""
        return self.driver()

    def driver(self) -> MicrovmDriver:
        """The same, with its powers."""
        return MicrovmDriver(self.config, (self.vmm(),), clock=SystemClock(), new_id=new_id)

    def spec(
        self, *, run: str = "", memory_mb: int = 64, disk_gb: int = 0, options: MicrovmOptions | None = None
    ) -> InstanceSpec:
        """A guest that obeys the line ``run`` at its start."""
        return InstanceSpec(
            kernel_path=str(self.kernel),
            kernel_args=f'run="{run}"' if run else "",
            memory_mb=memory_mb,
            disk_gb=disk_gb,
            microvm=options,
        )

    def shell(self) -> InstanceSpec:
        return self.spec()

    def exits(self, code: int) -> InstanceSpec:
        """A guest has no exit code: it ends by its own wish (0) or by a fault."""
        return self.spec(run="p" if code else "exit")

    def prints(self, text: str) -> InstanceSpec:
        return self.spec(run=f"say {text}")

    def missing_image(self) -> InstanceSpec:
        return InstanceSpec(kernel_path=str(self.images / "absent"), memory_mb=64)

    def invalid_image(self) -> InstanceSpec:
        path = self.images / "invalid"
        path.write_bytes(b"this is no kernel" * 100)
        return InstanceSpec(kernel_path=str(path), memory_mb=64)

    def leftovers(self) -> dict[str, list[str]]:
        """Files, processes, control groups and taps."""
        found = {
            "files": [
                str(path.relative_to(self.directory))
                for base in (self.config.data_dir / "instances", self.config.run_dir)
                for path in base.glob("*")
            ],
            "processes": [str(run.pid) for run in self.processes()],
            "control groups": list(ControlGroups(self.config.cgroup_root, self.config.cgroup).names()),
        }
        return {kind: names for kind, names in found.items() if names}


async def started(driver: MicrovmDriver, spec: InstanceSpec) -> str:
    """A running instance of ``spec``; its id."""
    made = assignment(spec)
    await driver.create(made)
    await driver.start(made.instance_id)
    return made.instance_id


async def answer(driver: MicrovmDriver, instance_id: str, line: str, wanted: str) -> str:
    """What the guest shows after a line, up to the wanted text."""
    console = await driver.attach(instance_id)
    try:
        await console.write(f"{line}\n".encode())
        return (await read_until(console, wanted.encode())).decode()
    finally:
        await console.close()


def pid_of(node: FirecrackerBench, instance_id: str) -> int:
    """The process of the VMM, by the instance's record."""
    record = next(r for r in RecordStore(node.config.data_dir).load() if r.instance_id == instance_id)
    assert record.run is not None
    return record.run.pid


def root_of(node: FirecrackerBench, instance_id: str) -> Path:
    """Root of the jail."""
    return node.vmm().root(node.config.data_dir / "instances" / instance_id)
