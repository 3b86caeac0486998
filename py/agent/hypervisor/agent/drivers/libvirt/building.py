"""What belongs to a virtual machine is made and undone here: its files taken over, disk, seed, definition."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from msgspec.structs import replace

from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.libvirt.base_files import BaseFiles, bases_of_overlays
from hypervisor.agent.drivers.libvirt.config import LibvirtConfig
from hypervisor.agent.drivers.libvirt.console import PipeFifos
from hypervisor.agent.drivers.libvirt.disks import Base, make_disk
from hypervisor.agent.drivers.libvirt.domain_xml import Disk, Domain, build_domain
from hypervisor.agent.drivers.libvirt.machines import Machines
from hypervisor.agent.drivers.libvirt.record import Record
from hypervisor.agent.drivers.libvirt.seed import build_seed
from hypervisor.agent.drivers.libvirt.specification import Wanted
from hypervisor.agent.drivers.local_images import local_image, located
from hypervisor.agent.drivers.machine_disks import DiskFormat, disk_size_bytes, probe_disk
from hypervisor.agent.drivers.machine_files import MachineFile, open_machine_file
from hypervisor.core.errors import AlreadyExists, HypervisorError, ResourceExhausted, Unavailable
from hypervisor.core.resources import GIB

__all__ = ["Builder", "Sources"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The files of a specification, taken over: names in the cache of the node, empty where there is none."""

    image: str = ""
    format: DiskFormat = DiskFormat.RAW
    disk_bytes: int = 0
    kernel: str = ""
    initrd: str = ""

    @property
    def has_disk(self) -> bool:
        """Whether the instance has a disk, over an image or empty."""
        return self.disk_bytes > 0

    @property
    def files(self) -> tuple[str, ...]:
        """All that are in use."""
        return tuple(name for name in (self.image, self.kernel, self.initrd) if name)


class Builder:
    """See the module's docstring. ``make`` and ``undo`` are called with the instance's lock held."""

    def __init__(self, config: LibvirtConfig, machines: Machines, fifos: PipeFifos) -> None:
        self._config = config
        self._machines = machines
        self._fifos = fifos
        self._bases = BaseFiles(config.bases)

    async def take_over(self, assignment: Assignment) -> Sources:
        """Check what the specification names, files of the node or images in its cache, and keep it. Raises what the
        checks raise, with the field's name."""
        spec = assignment.spec
        image, image_format, disk_bytes = "", DiskFormat.RAW, spec.disk_gb * GIB
        if spec.image:
            async with self._opened(assignment, "image") as (file, digest):
                found = await probe_disk(file, qemu_img=self._config.qemu_img)
                disk_bytes = disk_size_bytes(found, spec.disk_gb)
                image_format = found.format
                image = await self._bases.keep(file, kind=found.format, digest=digest)
        kernel = await self._keep(assignment, "kernel")
        initrd = await self._keep(assignment, "initrd")
        return Sources(image=image, format=image_format, disk_bytes=disk_bytes, kernel=kernel, initrd=initrd)

    async def _keep(self, assignment: Assignment, kind: str) -> str:
        if not getattr(assignment.spec, f"{kind}_path"):
            return ""
        async with self._opened(assignment, f"{kind}_path") as (file, digest):
            return await self._bases.keep(file, kind=kind, digest=digest)

    @asynccontextmanager
    async def _opened(self, assignment: Assignment, field: str) -> AsyncIterator[tuple[MachineFile, str]]:
        """The file that a field names, and the digest of its content where that is known."""
        local = local_image(assignment, field)
        path, roots = located(assignment, field, roots=self._config.roots)
        with await open_machine_file(path, field=f"spec.{field}", roots=roots) as file:
            yield file, "" if local is None else local.sha256

    async def make(self, assignment: Assignment, wanted: Wanted, sources: Sources, record: Record) -> bool:
        """Disk, seed and definition; returns whether they are new. What fails removes what it made."""
        before = await self._machines.find(record.instance_id)
        if before is not None:
            if before.record.image != record.image:
                raise AlreadyExists(
                    f"instance {record.instance_id} is on this node with another image: delete it first",
                    reason="INSTANCE_EXISTS",
                    metadata={"instance_id": record.instance_id},
                )
            old = before.record
            record = replace(record, started_at=old.started_at, stop_asked=old.stop_asked, end=old.end)
        try:
            document = await self._prepare(assignment, wanted, sources, record)
            await self._machines.define(record.instance_id, document)
        except HypervisorError:
            if before is None:
                await self.undo(record.instance_id)
            raise
        return before is None

    async def _prepare(self, assignment: Assignment, wanted: Wanted, sources: Sources, record: Record) -> str:
        directory = self._config.instances / record.instance_id
        seed = None
        try:
            await asyncio.to_thread(_make_directories, self._config.data_dir, directory.parent, directory)
            if assignment.spec.cloud_init is not None:
                seed = directory / "seed.iso"
                content = await asyncio.to_thread(
                    build_seed,
                    assignment.spec.cloud_init,
                    instance_id=record.instance_id,
                    name=assignment.name,
                )
                partial = directory / "seed.partial"
                await asyncio.to_thread(partial.write_bytes, content)
                partial.replace(seed)
        except OSError as exc:
            kind = ResourceExhausted if exc.errno == 28 else Unavailable
            raise kind(
                f"{directory} cannot be written: {exc.strerror}",
                reason="DISK_FULL" if kind is ResourceExhausted else "DATA_DIR_UNUSABLE",
            ) from exc
        disk = None
        if sources.has_disk:
            base = Base(self._bases.path(sources.image), sources.format) if sources.image else None
            disk = Disk(directory / "disk.qcow2", ((base.path, base.format),) if base else ())
            await make_disk(
                disk.path, base=base, size_bytes=sources.disk_bytes, qemu_img=self._config.qemu_img
            )
        return build_domain(
            Domain(
                record=record,
                kind=record.accelerator,
                vcpus=wanted.vcpus,
                max_vcpus=wanted.max_vcpus,
                cpu_millis=wanted.cpu_millis,
                memory_mb=wanted.memory_mb,
                max_memory_mb=wanted.max_memory_mb,
                console=self._fifos.source(record.instance_id),
                kernel=self._bases.path(sources.kernel) if sources.kernel else None,
                initrd=self._bases.path(sources.initrd) if sources.initrd else None,
                kernel_args=wanted.kernel_args,
                disk=disk,
                seed=seed,
                cards=wanted.cards,
                host_devices=wanted.host_devices,
                uefi=wanted.uefi,
            )
        )

    async def undo(self, instance_id: str) -> None:
        """Remove what a create made that has failed."""
        try:
            await self._machines.undefine(instance_id)
            await asyncio.to_thread(shutil.rmtree, self._config.instances / instance_id, ignore_errors=True)
        except HypervisorError as exc:
            # A delete or a repeated create finds what is left.
            _log.warning("vm_create_not_undone", instance_id=instance_id, error=str(exc))

    async def sweep(self) -> None:
        """Remove files that no instance uses any more; see :meth:`BaseFiles.sweep`."""
        try:
            used = {name for found in await self._machines.list() for name in found.record.files}
            used |= await asyncio.to_thread(bases_of_overlays, self._config.instances)
        except (HypervisorError, OSError) as exc:
            _log.warning("base_files_not_swept", error=str(exc))
            return
        await self._bases.sweep(used)


def _make_directories(*directories: Path) -> None:
    """QEMU's user may go through them, and nobody but the agent look into them."""
    for directory in directories:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
