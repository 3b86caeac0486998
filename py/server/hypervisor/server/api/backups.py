"""BackupService: files of records in pieces."""

from collections.abc import AsyncIterator

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.backups import MAX_BACKUP_BYTES, Backups
from hypervisor.v1 import backup_pb2
from hypervisor.wire.times import timestamp_of

__all__ = ["BackupHandlers"]


class BackupHandlers:
    """The handlers by method name: :attr:`handlers`."""

    def __init__(self, backups: Backups) -> None:
        self._backups = backups

    @property
    def handlers(self) -> dict[str, Handler]:
        """What BackupService offers."""
        return {"BackupCluster": self.backup, "RestoreCluster": self.restore}

    async def backup(
        self, request: backup_pb2.BackupClusterRequest, call: Call
    ) -> AsyncIterator[backup_pb2.BackupChunk]:
        async for piece in self._backups.backup():
            yield backup_pb2.BackupChunk(data=piece)

    async def restore(
        self, requests: AsyncIterator[backup_pb2.RestoreChunk], call: Call
    ) -> backup_pb2.RestoreClusterResponse:
        data = bytearray()
        async for chunk in requests:
            data += chunk.data
            if len(data) > MAX_BACKUP_BYTES:
                raise InvalidArgument.of_field(
                    "data", f"is more than {MAX_BACKUP_BYTES} bytes, which is the most"
                )
        restored = await self._backups.restore(bytes(data))
        return backup_pb2.RestoreClusterResponse(
            cluster_id=restored.cluster_id,
            made_at=timestamp_of(restored.made_at),
            records=restored.records,
            nodes=restored.nodes,
            instances=restored.instances,
            revision=restored.revision,
        )
