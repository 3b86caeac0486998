"""This server's own place in the cluster: its record, bound to a lease, and the cluster's identity."""

import asyncio

import structlog
from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, NotFound
from hypervisor.core.ids import IdSource
from hypervisor.server import keys
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.drafts import Draft
from hypervisor.server.records import ClusterConfig, ServerRecord
from hypervisor.server.store.storage import Storage

__all__ = ["Membership"]

log = structlog.get_logger(__name__)

_RETRY_S = 1.0


class Membership:
    """Says that this server is alive, as long as ``run`` runs; others then leave its operations alone."""

    def __init__(
        self,
        storage: Storage,
        committer: GroupCommitter,
        clock: Clock,
        *,
        server_id: str,
        address: str,
        version: str,
        new_id: IdSource,
        ttl_s: float = 15.0,
    ) -> None:
        self._storage = storage
        self._committer = committer
        self._clock = clock
        self._new_id = new_id
        self._ttl_s = ttl_s
        self._joined = asyncio.Event()
        self._record = ServerRecord(id=server_id, address=address, version=version, started_at=clock.now())

    def describe(self, *, http_url: str, image_store: str) -> None:
        """What others need for images; before :meth:`run`."""
        self._record = structs.replace(self._record, http_url=http_url, image_store=image_store)

    @property
    def record(self) -> ServerRecord:
        """What others see of this server."""
        return self._record

    async def joined(self) -> None:
        """Return once others can see this server; before that it must not begin operations."""
        await self._joined.wait()

    async def run(self) -> None:
        """Join, and stay joined through outages of the store, until cancelled; then leave."""
        lease_id = ""
        try:
            while True:
                try:
                    if not lease_id:
                        lease_id = await self._join()
                    await self._clock.sleep(self._ttl_s / 3)
                    await self._storage.keep_alive(lease_id)
                except NotFound:
                    log.warning("server_lease_ended", server_id=self._record.id)
                    lease_id = ""
                except HypervisorError as exc:
                    log.warning("server_lease_not_renewed", reason=exc.reason, error=str(exc))
                    await self._clock.sleep(_RETRY_S)
        finally:
            if lease_id:
                await self._leave(lease_id)

    async def _join(self) -> str:
        lease = await self._storage.grant_lease(self._ttl_s)
        await self._committer.commit(lambda draft: self._decide(draft, lease.id), even_restoring=True)
        self._joined.set()
        log.info("server_joined", server_id=self._record.id, address=self._record.address)
        return lease.id

    def _decide(self, draft: Draft, lease_id: str) -> None:
        if draft.get(keys.CLUSTER_CONFIG) is None:
            draft.put(keys.CLUSTER_CONFIG, ClusterConfig(cluster_id=self._new_id("c"), created_at=draft.now))
        draft.put(keys.server_lease(self._record.id), self._record, lease_id=lease_id)

    async def _leave(self, lease_id: str) -> None:
        # Leaving early is a courtesy (others take over sooner); the lease ends by itself, whatever the store answers.
        # A store that hangs is bounded by its own request time-out.
        try:
            await self._storage.revoke_lease(lease_id)
        except HypervisorError as exc:
            log.warning("server_leave_failed", reason=exc.reason, error=str(exc))
