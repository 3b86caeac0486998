"""What a specification asks of a microVM, checked, and the files it is made of. Everything in it is hostile input."""

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.local_images import located
from hypervisor.agent.drivers.machine_disks import DiskFormat, disk_size_bytes, probe_disk
from hypervisor.agent.drivers.machine_files import MachineFile, open_machine_file
from hypervisor.agent.drivers.microvm.config import MicrovmConfig
from hypervisor.agent.drivers.microvm.disks import make_disk
from hypervisor.agent.drivers.microvm.files import copy_into
from hypervisor.agent.drivers.microvm.taps import bridge_exists
from hypervisor.agent.drivers.microvm.vmm import DISK, INITRD, KERNEL
from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.model import InstanceSpec
from hypervisor.core.names import shorten
from hypervisor.core.resources import GIB
from hypervisor.core.states import InstanceType

__all__ = ["Sources", "can_name", "check_assignment", "open_sources", "write_files"]

_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def can_name(instance_id: str) -> bool:
    """Whether the id can name directories, control groups and jails."""
    return _ID.fullmatch(instance_id) is not None


def check_assignment(assignment: Assignment, config: MicrovmConfig) -> None:
    """Refuse what no microVM can be; InvalidArgument names every wrong field."""
    wrong: list[FieldViolation] = []

    def add(field: str, description: str) -> None:
        wrong.append(FieldViolation(field, description))

    spec = assignment.spec
    if not can_name(assignment.instance_id):
        add("id", f"{shorten(assignment.instance_id)} cannot name a microVM: 1 to 63 of a-z, 0-9 and '-'")
    if assignment.type is not InstanceType.MICROVM:
        add("type", f"this driver runs microVMs, not {assignment.type}")
    if spec.cpu_millis <= 0:
        add("spec.cpu_cores", "must be more than nothing")
    if spec.memory_mb <= 0:
        add("spec.memory_mb", "must be more than nothing")
    if spec.disk_gb < 0:
        add("spec.disk_gb", "must not be less than 0")
    if not spec.kernel_path and config.kernel is None:
        add("spec.kernel_path", "is needed, as this node has no default kernel (machines.kernel)")
    if not (spec.kernel_args.isascii() and (spec.kernel_args.isprintable() or not spec.kernel_args)):
        add("spec.kernel_args", "takes printable ASCII characters alone")
    for field, value in (("command", spec.command), ("env", spec.env), ("working_dir", spec.working_dir)):
        if value:
            add(f"spec.{field}", "is for containers: a microVM runs what its kernel and image start")
    if spec.cloud_init is not None:
        add(
            "spec.cloud_init",
            "microVMs have no cloud-init seed: use spec.microvm.metadata, or an instance of type vm",
        )
    if spec.vm is not None:
        add("spec.vm", "is for instances of type vm: remove it")
    _check_networks(spec, config, add)
    if wrong:
        raise InvalidArgument.of_fields(tuple(wrong))


def _check_networks(spec: InstanceSpec, config: MicrovmConfig, add: Callable[[str, str], None]) -> None:
    if len(spec.networks) > 8:
        add("spec.networks", f"has {len(spec.networks)} cards: use at most 8")
        return
    for index, network in enumerate(spec.networks):
        field = f"spec.networks[{index}]"
        if network.bridge not in config.bridges:
            allowed = ", ".join(config.bridges) or "none"
            add(
                f"{field}.bridge",
                f"{shorten(network.bridge)} is none of this node's (machines.bridges: {allowed})",
            )
        elif not bridge_exists(network.bridge):
            add(
                f"{field}.bridge",
                f"{network.bridge} is allowed here, but the node has no such bridge: make it",
            )
        if network.mac and not _MAC.fullmatch(network.mac):
            add(
                f"{field}.mac",
                f"{shorten(network.mac)} is no address of one card: write it as 06:00:00:12:34:56",
            )


@dataclass(slots=True)
class Sources:
    """Checked and open files of the host; close them."""

    kernel: MachineFile
    initrd: MachineFile | None = None
    image: MachineFile | None = None
    format: DiskFormat = DiskFormat.RAW
    disk_bytes: int = 0
    """Size of the disk; 0: there is none."""

    def close(self) -> None:
        """Close all. Idempotent."""
        for file in (self.kernel, self.initrd, self.image):
            if file is not None:
                file.close()


async def open_sources(assignment: Assignment, config: MicrovmConfig) -> Sources:
    """Open what the specification names: files of the node, or images in its cache. Errors of
    :mod:`..local_images`, :mod:`..machine_files` and :mod:`..machine_disks`."""
    spec = assignment.spec

    async def opened(field: str) -> MachineFile:
        path, roots = located(assignment, field, roots=config.roots)
        return await open_machine_file(path, field=f"spec.{field}", roots=roots)

    if spec.kernel_path:
        kernel = await opened("kernel_path")
    else:
        assert config.kernel is not None
        kernel = await open_machine_file(
            str(config.kernel), field="machines.kernel", roots=(config.kernel.parent,)
        )
    sources = Sources(kernel)
    try:
        if spec.initrd_path:
            sources.initrd = await opened("initrd_path")
        sources.disk_bytes = spec.disk_gb * GIB
        if spec.image:
            sources.image = await opened("image")
            image = await probe_disk(sources.image)
            sources.format = image.format
            sources.disk_bytes = disk_size_bytes(image, spec.disk_gb)
    except BaseException:
        sources.close()
        raise
    return sources


async def write_files(sources: Sources, root: Path, *, uid: int) -> None:
    """Make the root with copies of the files, never links: the VMM's user owns it. Raises as ``make_disk``."""

    def write() -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy_into(sources.kernel.fd, root / KERNEL, uid=uid, mode=0o400)
        if sources.initrd is not None:
            copy_into(sources.initrd.fd, root / INITRD, uid=uid, mode=0o400)
        if uid:
            os.chown(root, uid, uid)

    await asyncio.to_thread(write)
    if sources.disk_bytes:
        await make_disk(
            root / DISK, image=sources.image, format=sources.format, size_bytes=sources.disk_bytes, uid=uid
        )
