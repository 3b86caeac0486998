"""Configuration of what runs virtual machines and microVMs: the sections `libvirt` and `microvm` of agent.yaml."""

import re
from pathlib import Path

import pydantic

from hypervisor.core.machines import VmmChoice
from hypervisor.core.settings import Duration, Section

__all__ = ["LibvirtSection", "MachinesSection", "MicrovmSection"]

_BRIDGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")


class MachinesSection(Section):
    """What machines of both kinds may use of the node."""

    roots: tuple[Path, ...] = pydantic.Field(
        default=(Path("/var/lib/hypervisor/images"), Path("/boot")),
        description="Directories from which kernels, initial RAM disks and disk images given by path may be taken. "
        "None: only imported images can be used.",
    )
    bridges: tuple[str, ...] = pydantic.Field(
        default=(),
        description="Bridges of the node that network cards may be plugged into. None: machines have no network.",
    )
    host_devices: tuple[str, ...] = pydantic.Field(
        default=(),
        description="PCI addresses of devices that machines may be given, such as `0000:01:00.0`.",
    )
    kernel: Path | None = pydantic.Field(
        default=None, description="Kernel of microVMs whose specification names none."
    )

    @pydantic.field_validator("bridges")
    @classmethod
    def _bridges_are_names(cls, bridges: tuple[str, ...]) -> tuple[str, ...]:
        for bridge in bridges:
            if not _BRIDGE.fullmatch(bridge):
                raise ValueError(
                    f"{bridge!r} is not the name of a bridge: at most 15 letters, digits, '.', '_', '-'"
                )
        return bridges


class LibvirtSection(Section):
    """The driver of virtual machines."""

    uri: str = pydantic.Field(default="qemu:///system", description="libvirt's connection URI.")
    data_dir: Path = pydantic.Field(
        default=Path("/var/lib/hypervisor/vms"),
        description="Overlays, seeds and firmware variables of virtual machines, this agent's alone; libvirt's QEMU "
        "must be able to reach it.",
    )


class MicrovmSection(Section):
    """The driver of microVMs."""

    vmm: VmmChoice = pydantic.Field(
        default=VmmChoice.AUTO,
        description="`firecracker`, `qemu`, or `auto`: Firecracker where a boot probe shows that it runs guests here, "
        "else QEMU. What a specification asks for wins.",
    )
    firecracker: Path = pydantic.Field(
        default=Path("firecracker"), description="Firecracker's program; without '/', looked for in PATH."
    )
    jailer: Path = pydantic.Field(
        default=Path("jailer"),
        description="Firecracker's jailer; without '/', looked for in PATH. Used where the agent runs as root.",
    )
    jail: bool = pydantic.Field(
        default=True,
        description="Run Firecracker in its jail (a user of its own for each instance, chroot, control group) where "
        "the agent runs as root.",
    )
    first_uid: int = pydantic.Field(
        default=2_000_000,
        ge=1000,
        le=4_000_000_000,
        description="First of the 65,536 user and group ids that jails take.",
    )
    qemu: Path = pydantic.Field(
        default=Path("qemu-system-x86_64"), description="QEMU's program; without '/', looked for in PATH."
    )
    run_dir: Path = pydantic.Field(
        default=Path("/run/hypervisor/microvms"),
        description="Sockets and FIFOs; a short path that has to survive the agent, not the machine.",
    )
    data_dir: Path = pydantic.Field(
        default=Path("/var/lib/hypervisor/microvms"),
        description="Disks, snapshots and jails of microVMs, this agent's alone.",
    )
    probe_timeout: Duration = pydantic.Field(
        default=20.0,
        gt=0,
        le=600,
        description="How long the boot probe of a VMM may take before it has failed.",
    )
