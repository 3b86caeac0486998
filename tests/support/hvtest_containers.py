"""The containerd driver over a private containerd: what its tests and the contract suite share."""

import asyncio
import os
import random
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path

from hvtest_agent_waiting import within
from hvtest_containerd import PrivateContainerd
from hypervisor.agent.drivers.containerd import ContainerdConfig, ContainerdDriver
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType
from hypervisor.ctl.oci_image import build_archive

__all__ = ["BUSYBOX", "ContainerdBench", "assignment", "started", "until"]

BUSYBOX = Path(os.environ.get("HYPERVISOR_TEST_BUSYBOX", "/bin/busybox"))
"""A static busybox (Debian: busybox-static)."""


def assignment(spec: InstanceSpec, *, name: str = "box") -> Assignment:
    """A fresh container instance."""
    return Assignment(
        instance_id=new_id("i"), name=name, project="default", type=InstanceType.CONTAINER, spec=spec
    )


class ContainerdBench:
    """One private containerd with an image of busybox, and drivers over it (``DriverBench``)."""

    kind = InstanceType.CONTAINER

    def __init__(self, containerd: PrivateContainerd) -> None:
        self.containerd = containerd
        self.images = containerd.directory / "images"
        self.images.mkdir(exist_ok=True)
        self.archive = self.images / "busybox.tar"
        build_archive(BUSYBOX, self.archive, name="busybox:test")
        self.config = ContainerdConfig(
            address=containerd.address,
            namespace=containerd.namespace,
            console_root=containerd.directory / "consoles",
            archive_roots=(self.images,),
        )

    async def open(self) -> ContainerdDriver:
        """A driver, as an agent that starts makes one."""
        return ContainerdDriver(self.config, clock=SystemClock(), new_id=new_id, rng=random.Random(7))

    def spec(self, script: str = "", *, memory_mb: int = 64, cpu_millis: int = 1000) -> InstanceSpec:
        """A container that runs a script of the shell; without one it is an interactive shell."""
        return InstanceSpec(
            image=f"oci-archive:{self.archive}",
            command=("sh", "-c", script) if script else (),
            memory_mb=memory_mb,
            cpu_millis=cpu_millis,
        )

    def shell(self) -> InstanceSpec:
        return self.spec()

    def exits(self, code: int) -> InstanceSpec:
        return self.spec(f"exit {code}")

    def prints(self, text: str) -> InstanceSpec:
        return self.spec(f"echo {shlex.quote(text)}")

    def missing_image(self) -> InstanceSpec:
        return InstanceSpec(image="docker.io/library/absent:1")

    def invalid_image(self) -> InstanceSpec:
        path = self.images / "invalid.tar"
        path.write_bytes(b"this is no archive")
        return InstanceSpec(image=f"oci-archive:{path}")

    def leftovers(self) -> dict[str, list[str]]:
        found = self.containerd.leftovers()
        if self.config.console_root.is_dir() and (
            fifos := [p.name for p in self.config.console_root.iterdir()]
        ):
            found["console directories"] = fifos
        return found


async def started(driver: ContainerdDriver, spec: InstanceSpec) -> Assignment:
    """A running instance of ``spec``."""
    made = assignment(spec)
    await driver.create(made)
    await driver.start(made.instance_id)
    return made


async def until(probe: Callable[[], Awaitable[bool]], *, what: str, timeout_s: float = 20.0) -> None:
    """Return once ``probe`` says so; AssertionError after ``timeout_s``."""

    async def poll() -> None:
        while not await probe():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    await within(poll(), what=what, timeout_s=timeout_s)
