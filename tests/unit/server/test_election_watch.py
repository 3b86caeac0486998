"""An election whose watch loses an event."""

import asyncio
from collections.abc import AsyncGenerator

from hypervisor.core.clock import SystemClock
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import WatchBatch


class _Deaf(MemoryStorage):
    """Its watches tell nothing."""

    async def _watch(self, prefix: str, after_revision: int) -> AsyncGenerator[WatchBatch, None]:
        await asyncio.Event().wait()
        yield WatchBatch(0, ())


async def test_a_candidate_whose_watch_lost_the_event_leads_all_the_same() -> None:
    """Seed 30: the cluster had no leader any more."""
    store = _Deaf(SystemClock())
    async with asyncio.timeout(30), store.election("e", "b", ttl_s=1.0) as first:
        await first.acquire()
        async with store.election("e", "c", ttl_s=1.0) as second:
            acquiring = asyncio.create_task(second.acquire())
            await asyncio.sleep(0)
            await store.revoke_lease(first._lease_id)  # type: ignore[attr-defined]

            assert (await acquiring).leader_id == "c"
    await store.aclose()
