"""The libvirt driver's side of the Driver contract: a private libvirtd, and specs that boot the small Linux guest."""

import random

from hvtest_driver_watching import read_until
from hvtest_guests import KERNEL_ARGS, linux_guest
from hvtest_libvirtd import PrivateLibvirtd
from hypervisor.agent.drivers.driver import Assignment, Console
from hypervisor.agent.drivers.libvirt import LibvirtConfig, LibvirtDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType

__all__ = ["MEMORY_MB", "VmBench", "answer", "ready", "started", "vm_assignment"]

MEMORY_MB = 96


class VmBench:
    """See ``hvtest_driver_contract.DriverBench``. A virtual machine has no exit code of its own: one that ends with an
    error panics. Files may be taken from the guest's directory and from ``images``."""

    kind = InstanceType.VM

    def __init__(self, libvirtd: PrivateLibvirtd) -> None:
        self.libvirtd = libvirtd
        self.images = libvirtd.directory / "images"
        self.images.mkdir(exist_ok=True)
        self.data = libvirtd.directory / "data"

    def config(self, **more: object) -> LibvirtConfig:
        """The driver's configuration."""
        guest = linux_guest()
        settings: dict[str, object] = {
            "uri": self.libvirtd.uri,
            "data_dir": self.data,
            "qemu_logs": self.libvirtd.directory / "log" / "qemu",
            "roots": (self.images, guest.kernel.parent, guest.initrd.parent),
        }
        return LibvirtConfig(**(settings | more))  # type: ignore[arg-type]

    async def open(self) -> LibvirtDriver:
        """A driver over the private libvirtd."""
        return LibvirtDriver(self.config(), clock=SystemClock(), rng=random.Random(7))

    def spec(self, words: str = "", **more: object) -> InstanceSpec:
        """An instance that boots the guest with these words on the kernel's command line."""
        guest = linux_guest()
        settings: dict[str, object] = {
            "kernel_path": str(guest.kernel),
            "initrd_path": str(guest.initrd),
            "kernel_args": f"{KERNEL_ARGS} {words}".strip(),
            "memory_mb": MEMORY_MB,
        }
        return InstanceSpec(**(settings | more))  # type: ignore[arg-type]

    def shell(self) -> InstanceSpec:
        """With an empty disk, in which snapshots are kept."""
        return self.spec(disk_gb=1)

    def exits(self, code: int) -> InstanceSpec:
        """An instance that ends by itself; by a panic unless the code is 0."""
        return self.spec(f'GUEST_RUN="exit {code}" GUEST_ON_ERROR=panic')

    def prints(self, text: str) -> InstanceSpec:
        """An instance that prints the text and ends."""
        return self.spec(f'GUEST_RUN="echo {text}"')

    def missing_image(self) -> InstanceSpec:
        """A path where nothing is."""
        return InstanceSpec(image=str(self.images / "absent.qcow2"), memory_mb=MEMORY_MB)

    def invalid_image(self) -> InstanceSpec:
        """A file that is no disk image."""
        path = self.images / "invalid.img"
        path.write_bytes(b"no disk image")
        return InstanceSpec(image=str(path), memory_mb=MEMORY_MB)

    def leftovers(self) -> dict[str, list[str]]:
        """What is left in libvirt and in the driver's directory."""
        return self.libvirtd.leftovers()


def vm_assignment(spec: InstanceSpec, **more: object) -> Assignment:
    """A spec as the agent is asked for it."""
    settings: dict[str, object] = {
        "instance_id": new_id("i"),
        "name": "box",
        "project": "default",
        "type": InstanceType.VM,
        "spec": spec,
    }
    return Assignment(**(settings | more))  # type: ignore[arg-type]


async def started(driver: LibvirtDriver, spec: InstanceSpec) -> Assignment:
    """An instance that runs."""
    made = vm_assignment(spec)
    await driver.create(made)
    await driver.start(made.instance_id)
    return made


async def ready(driver: LibvirtDriver, spec: InstanceSpec) -> tuple[Assignment, Console]:
    """An instance whose guest takes commands, and its console."""
    made = await started(driver, spec)
    console = await driver.attach(made.instance_id)
    await read_until(console, b"READY")
    return made, console


async def answer(console: Console, command: str) -> str:
    """What the guest's shell prints for a command."""
    word = new_id("w")
    first, last = f"[{word}", f"{word}]"
    # Each in two halves, so that the terminal's echo of the line is not taken for them.
    line = f"echo '[''{word}'; {command}; echo '{word}'']'"
    await console.write(line.encode() + b"\n")
    seen = (await read_until(console, f"{last}\r\n".encode())).decode(errors="replace")
    return seen.partition(f"{first}\r\n")[2].rpartition(last)[0].replace("\r\n", "\n").strip()
