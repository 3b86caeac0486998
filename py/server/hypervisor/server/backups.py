"""Backup and restore of all records of the cluster.

A backup is a list of the store at one revision, without what is bound to processes (leases, elections). A restore puts
the records into a store that has no instances yet. It takes more than one transaction, so it says first that it is
under way (``config/restoring``): from then on no server commits anything else, and nothing that is there by half is
acted on. One that broke off stands, with that record, until it is finished.

Nodes are restored as offline and without a lease, so that each agent registers anew and tells what it runs; see
``adopting.py`` for what was placed elsewhere after the backup.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import structlog
from msgspec import structs

from hypervisor.core.backup_file import BackupHeader, BackupRecord, BackupWriter, read_backup
from hypervisor.core.clock import Clock
from hypervisor.core.errors import Conflict, FailedPrecondition, Internal, InvalidArgument
from hypervisor.core.model import decode, encode
from hypervisor.core.states import NodeStatus
from hypervisor.server import keys
from hypervisor.server.records import ClusterConfig, Restoring
from hypervisor.server.store.storage import (
    ABSENT,
    MAX_COMMIT_BYTES,
    MAX_OPERATIONS,
    Compare,
    Conflicted,
    Delete,
    Item,
    Put,
    Storage,
)
from hypervisor.server.view import StoreView

__all__ = ["MAX_BACKUP_BYTES", "Backups", "Restored"]

MAX_BACKUP_BYTES = 512 << 20
"""Larger files are not taken: they are held in memory while they are checked."""
_OF_PROCESSES = (f"{keys.PREFIX}leases/", f"{keys.PREFIX}elections/", keys.RESTORING.path)
_NODES = f"{keys.PREFIX}nodes/"
_INSTANCES = f"{keys.PREFIX}instances/"
_IN_THE_WAY = {_INSTANCES: "instances", f"{keys.PREFIX}images/": "images"}
_ENTRY_BYTES = 64

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did. ``revision``: the store's after it."""

    cluster_id: str
    made_at: datetime
    records: int
    nodes: int
    instances: int
    revision: int


class Backups:
    """See the module's docstring."""

    def __init__(self, storage: Storage, view: StoreView, clock: Clock, *, version: str) -> None:
        self._storage = storage
        self._view = view
        self._clock = clock
        self._version = version

    async def backup(self) -> AsyncIterator[bytes]:
        """The file in pieces. ``Compacted`` when the store forgets the revision meanwhile: begin anew."""
        start, revision, writer = "", None, None
        while True:
            page = await self._storage.list(keys.PREFIX, start_key=start, revision=revision)
            if writer is None:
                config = await self._config()
                writer = BackupWriter(
                    BackupHeader(
                        cluster_id=config.cluster_id,
                        revision=page.revision,
                        made_at=self._clock.now(),
                        version=self._version,
                    )
                )
            for piece in writer.add(_records(page.items)):
                yield piece
            start, revision = page.next_key, page.revision
            if not start:
                yield writer.end()
                return

    async def restore(self, data: bytes) -> Restored:
        """Put the records of the file in. See RestoreCluster in backup.proto for what is refused.

        Raises ``Conflict`` (``RESTORE_DISTURBED``) when another program writes the same records meanwhile.
        """
        header, records, digest = read_backup(data)
        wanted = {record.key: _checked(record) for record in records}
        if keys.CLUSTER_CONFIG.path not in wanted:
            raise InvalidArgument(
                "this is no whole backup: it does not say of which cluster it is", reason="BACKUP_DAMAGED"
            )
        await self._begin(wanted, digest)
        present = await self._present()
        _refuse_others(present, wanted)
        for compares, puts in _batches(wanted, present):
            await self._commit(compares, puts)
        revision = await self._finish(wanted[keys.CLUSTER_CONFIG.path])
        await self._view.wait_revision(revision)
        log.warning("cluster_restored", cluster_id=header.cluster_id, revision=revision, records=len(records))
        return Restored(
            cluster_id=header.cluster_id,
            made_at=header.made_at,
            records=len(records),
            nodes=sum(key.startswith(_NODES) for key in wanted),
            instances=sum(key.startswith(_INSTANCES) for key in wanted),
            revision=revision,
        )

    async def _config(self) -> ClusterConfig:
        item = await self._storage.get(keys.CLUSTER_CONFIG.path)
        if item is None:
            raise Internal("the store does not say which cluster it is of")
        return decode(ClusterConfig, item.value, key=item.key)

    async def _begin(self, wanted: dict[str, bytes], digest: str) -> None:
        present = await self._present()
        marker = present.get(keys.RESTORING.path)
        if marker is None:
            _refuse_others(present, {})
            restoring = Restoring(sha256=digest, started_at=self._clock.now())
            await self._commit(
                [Compare(keys.RESTORING.path, ABSENT)], [Put(keys.RESTORING.path, encode(restoring))]
            )
            log.warning("cluster_restoring", records=len(wanted), sha256=digest)
            return
        under_way = decode(Restoring, marker.value, key=marker.key)
        if under_way.sha256 != digest:
            raise FailedPrecondition(
                f"the restore of another file, begun {under_way.started_at:%Y-%m-%d %H:%M:%S} UTC, is not finished: "
                "finish it with that file, or begin with an empty store",
                reason="RESTORE_UNFINISHED",
                metadata={"sha256": under_way.sha256},
            )

    async def _finish(self, config: bytes) -> int:
        marker = await self._storage.get(keys.RESTORING.path)
        if marker is None:
            raise _disturbed()
        restored = structs.replace(
            decode(ClusterConfig, config, key=keys.CLUSTER_CONFIG.path), restored_at=self._clock.now()
        )
        return await self._commit(
            [Compare(marker.key, marker.mod_revision)],
            [Put(keys.CLUSTER_CONFIG.path, encode(restored)), Delete(marker.key)],
        )

    async def _present(self) -> dict[str, Item]:
        found: dict[str, Item] = {}
        start, revision = "", None
        while True:
            page = await self._storage.list(keys.PREFIX, start_key=start, revision=revision)
            found.update((item.key, item) for item in page.items)
            start, revision = page.next_key, page.revision
            if not start:
                return found

    async def _commit(self, compares: list[Compare], operations: list[Put | Delete]) -> int:
        outcome = await self._storage.commit(compares, operations)
        if isinstance(outcome, Conflicted):
            raise _disturbed()
        return outcome.revision


def _records(items: Iterable[Item]) -> Iterator[BackupRecord]:
    for item in items:
        if not item.key.startswith(_OF_PROCESSES):
            yield BackupRecord(key=item.key, value=msgspec.Raw(item.value))


def _checked(record: BackupRecord) -> bytes:
    """What is to be stored. InvalidArgument (``BACKUP_UNREADABLE``) for what this version cannot read."""
    if not record.key.startswith(keys.PREFIX) or record.key.startswith(_OF_PROCESSES):
        raise InvalidArgument(
            f"the backup has a record under {record.key}, which no backup has", reason="BACKUP_UNREADABLE"
        )
    value = bytes(record.value)
    if record.key.startswith(_NODES):
        value = _offline(value)
    known = keys.parse(record.key)
    if known is not None:
        try:
            decode(known.kind, value, key=record.key)
        except Internal as exc:
            raise InvalidArgument(
                f"{exc.message}; nothing was changed",
                reason="BACKUP_UNREADABLE",
                metadata={"key": record.key},
            ) from exc
    return value


def _offline(node: bytes) -> bytes:
    members: Any = msgspec.json.decode(node)
    if not isinstance(members, dict):
        return node
    members |= {"lease_id": "", "incarnation": "", "status": NodeStatus.OFFLINE.value}
    members["status_message"] = "restored from a backup; its agent has not registered since"
    return msgspec.json.encode(members)


def _refuse_others(present: Iterable[str], wanted: Iterable[str]) -> None:
    others = set(present) - set(wanted)
    for prefix, what in _IN_THE_WAY.items():
        count = sum(key.startswith(prefix) for key in others)
        if count:
            raise FailedPrecondition(
                f"the cluster has {count} {what} of its own: a backup is restored into a store that was just begun; "
                "stop all servers, put their store aside, start one server and restore then",
                reason="CLUSTER_NOT_EMPTY",
                metadata={what: str(count)},
            )


def _batches(
    wanted: dict[str, bytes], present: dict[str, Item]
) -> Iterator[tuple[list[Compare], list[Put | Delete]]]:
    compares: list[Compare] = []
    puts: list[Put | Delete] = []
    size = 0
    for key, value in wanted.items():
        there = present.get(key)
        if there is not None and there.value == value:
            continue
        added = 3 * len(key) + len(value) + 2 * _ENTRY_BYTES
        if puts and (len(puts) >= MAX_OPERATIONS or size + added > MAX_COMMIT_BYTES):
            yield compares, puts
            compares, puts, size = [], [], 0
        compares.append(Compare(key, ABSENT if there is None else there.mod_revision))
        puts.append(Put(key, value))
        size += added
    if puts:
        yield compares, puts


def _disturbed() -> Conflict:
    return Conflict(
        "something else writes to the store while the backup is restored: stop the other servers and run the restore "
        "again with the same file; it goes on where it is",
        reason="RESTORE_DISTURBED",
    )
