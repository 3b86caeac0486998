"""libvirt's domains as typed calls: one method per thing done, no decisions. Domains are named by the instance id.

All raise what :meth:`Connection.query` and :meth:`Connection.act` raise; ``NotFound`` (``INSTANCE_NOT_FOUND``) where
there is no such domain. What is recorded with a domain is in its stored definition alone, so that it is the same
whether the domain runs or not.

Several agents may use one libvirt. A domain is ours when its record names our ``home``, the driver's data directory;
one of another agent, or of anybody else, is neither seen nor touched.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import structlog

from hypervisor.agent.drivers.libvirt.connection import Connection
from hypervisor.agent.drivers.libvirt.failures import domain_not_ours, is_missing
from hypervisor.agent.drivers.libvirt.observing import DomainState, Phase
from hypervisor.agent.drivers.libvirt.record import METADATA_KEY, METADATA_URI, Record

__all__ = ["Found", "Machines"]

_START_TIMEOUT_S = 55.0
_MEMORY_TIMEOUT_S = 290.0
"""For what writes or reads a guest's whole memory."""
_UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
)

_UNDEFINE_FEWER = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A domain of ours: what it does and what is recorded with it."""

    record: Record
    state: DomainState


class Machines:
    """See the module's docstring."""

    def __init__(self, connection: Connection, *, home: Path) -> None:
        self._connection = connection
        self.home = str(home.absolute())

    async def versions(self) -> tuple[str, str]:
        """Of libvirt and of its hypervisor (QEMU), such as ``9.0.0``; asked of the daemon, so proof that it answers."""

        def ask(connection: Any) -> tuple[int, int]:
            return connection.getLibVersion(), connection.getVersion()

        library, hypervisor = await self._connection.query(ask, what="ask for its version")
        return _dotted(library), _dotted(hypervisor)

    async def emulator(self) -> str:
        """Path of the program that runs guests without KVM; what libvirt would use itself."""

        def ask(connection: Any) -> str:
            return str(connection.getDomainCapabilities(None, "x86_64", "q35", "qemu", 0))

        return await self._connection.query(ask, what="ask for its capabilities", timeout_s=30.0)

    async def hypervisor_type(self) -> str:
        """``QEMU``, or ``Test`` of libvirt's own test driver."""
        return await self._connection.query(lambda c: str(c.getType()), what="ask what it runs")

    async def find(self, instance_id: str) -> Found | None:
        """The domain; None where there is none, or one that is not ours. ValueError where its record is damaged."""

        def ask(connection: Any) -> Found | None:
            try:
                return self._ours(connection.lookupByName(instance_id))
            except libvirt.libvirtError as exc:
                if is_missing(exc):
                    return None
                raise

        return await self._connection.query(ask, what=f"look up {instance_id}", instance_id=instance_id)

    async def list(self) -> tuple[Found, ...]:
        """Every domain of ours; one whose record is damaged is told of in the log and left out."""

        def ask(connection: Any) -> tuple[Found, ...]:
            listed = []
            for domain in connection.listAllDomains(0):
                try:
                    found = self._ours(domain)
                except ValueError as exc:
                    _log.warning("domain_record_unreadable", domain=domain.name(), error=str(exc))
                except libvirt.libvirtError as exc:
                    # One that went away since the listing was taken.
                    if not is_missing(exc):
                        raise
                else:
                    if found is not None:
                        listed.append(found)
            return tuple(listed)

        return await self._connection.query(ask, what="list virtual machines")

    async def define(self, instance_id: str, document: str) -> None:
        """Store a definition, in the place of an earlier one of ours. ``AlreadyExists`` (``DOMAIN_NOT_OURS``) where
        somebody else has a domain of this name."""

        def act(connection: Any) -> None:
            try:
                ours = self._ours(connection.lookupByName(instance_id)) is not None
            except libvirt.libvirtError as exc:
                if not is_missing(exc):
                    raise
            else:
                if not ours:
                    raise domain_not_ours(instance_id)
            connection.defineXMLFlags(document, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

        await self._connection.act(act, what=f"define {instance_id}", instance_id=instance_id)

    async def undefine(self, instance_id: str) -> bool:
        """Remove the definition with firmware variables, saved memory and what is known of snapshots; whether there
        was one."""

        def act(connection: Any) -> bool:
            try:
                domain = connection.lookupByName(instance_id)
                if self._ours(domain) is None:
                    return False
                try:
                    domain.undefineFlags(_UNDEFINE_FLAGS)
                except libvirt.libvirtError as exc:
                    if exc.get_error_code() not in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_INVALID_ARG):
                        raise
                    # libvirt's test driver knows fewer flags.
                    domain.undefineFlags(_UNDEFINE_FEWER)
            except libvirt.libvirtError as exc:
                if is_missing(exc):
                    return False
                raise
            return True

        return await self._connection.act(act, what=f"remove {instance_id}", instance_id=instance_id)

    async def write_record(self, record: Record) -> None:
        """Replace what is recorded with a domain."""
        await self._domain(
            record.instance_id, f"record the state of {record.instance_id}", lambda d: _write(d, record)
        )

    async def start(self, record: Record, *, paused: bool = False) -> None:
        """Start, or go on from saved memory where there is any; then record it."""

        def act(domain: Any) -> None:
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
            _write(domain, record)

        await self._domain(record.instance_id, f"start {record.instance_id}", act, timeout_s=_START_TIMEOUT_S)

    async def press_power_button(self, instance_id: str) -> None:
        """Ask the guest to end, through its agent or by ACPI; does not wait."""
        await self._domain(instance_id, f"ask {instance_id} to end", lambda d: d.shutdown())

    async def destroy(self, instance_id: str) -> bool:
        """End it by force; whether it ran."""

        def act(domain: Any) -> bool:
            try:
                domain.destroy()
            except libvirt.libvirtError as exc:
                if exc.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:
                    return False
                raise
            return True

        return bool(await self._domain(instance_id, f"end {instance_id}", act))

    async def pause(self, instance_id: str) -> None:
        """Freeze it."""
        await self._domain(instance_id, f"pause {instance_id}", lambda d: d.suspend())

    async def resume(self, instance_id: str) -> None:
        """Let it go on."""
        await self._domain(instance_id, f"resume {instance_id}", lambda d: d.resume())

    async def save(self, instance_id: str) -> None:
        """Write its memory to disk and end it; the next start goes on running, whether it was paused or not."""
        await self._domain(
            instance_id,
            f"save the memory of {instance_id}",
            lambda d: d.managedSave(libvirt.VIR_DOMAIN_SAVE_RUNNING),
            timeout_s=_MEMORY_TIMEOUT_S,
        )

    async def drop_saved(self, instance_id: str) -> None:
        """Forget its saved memory, if any."""

        def act(domain: Any) -> None:
            if domain.hasManagedSaveImage(0):
                domain.managedSaveRemove(0)

        await self._domain(instance_id, f"forget the saved memory of {instance_id}", act)

    async def with_domain(self, instance_id: str, what: str, function: Any, *, slow: bool = False) -> Any:
        """Run ``function`` with the domain, on a thread; ``slow`` where it handles a guest's whole memory."""
        return await self._domain(
            instance_id, what, function, timeout_s=_MEMORY_TIMEOUT_S if slow else _START_TIMEOUT_S
        )

    def _ours(self, domain: Any) -> Found | None:
        found = _found(domain)
        return found if found is not None and found.record.home == self.home else None

    async def _domain(self, instance_id: str, what: str, function: Any, *, timeout_s: float = 55.0) -> Any:
        return await self._connection.act(
            lambda c: function(c.lookupByName(instance_id)),
            what=what,
            timeout_s=timeout_s,
            instance_id=instance_id,
        )


def _found(domain: Any) -> Found | None:
    try:
        text = domain.metadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_URI, libvirt.VIR_DOMAIN_AFFECT_CONFIG
        )
    except libvirt.libvirtError as exc:
        # Somebody else's virtual machine, or one that somebody runs without a definition.
        if exc.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise
    state, reason = domain.state()
    off = DomainState(state, reason)
    saved = off.phase is Phase.OFF and bool(domain.hasManagedSaveImage(0))
    record = Record.from_xml(text)
    if record.instance_id != domain.name():
        raise ValueError(f"it says that it is {record.instance_id}")
    return Found(record, DomainState(state, reason, saved))


def _write(domain: Any, record: Record) -> None:
    domain.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT,
        record.to_xml(),
        METADATA_KEY,
        METADATA_URI,
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )


def _dotted(version: int) -> str:
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
