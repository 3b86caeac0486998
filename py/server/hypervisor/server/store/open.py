"""Which backends there are, and opening the one the configuration names."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, InvalidArgument
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.storage import Storage

__all__ = ["BACKENDS", "open_storage"]

_ONE_SERVER = frozenset({"sqlite"})
"""Backends that one process at a time can have open."""

log = structlog.get_logger(__name__)


async def _open_sqlite(config: StoreConfig, clock: Clock) -> Storage:
    from hypervisor.server.store.sqlite import SqliteStorage

    return await SqliteStorage.open(config, clock=clock)


async def _open_etcd(config: StoreConfig, clock: Clock) -> Storage:
    # Imported here: a server on SQLite needs neither the etcd stubs nor the time to load them.
    from hypervisor.server.store.etcd import EtcdStorage

    return await EtcdStorage.open(config, clock=clock)


async def _open_memory(config: StoreConfig, clock: Clock) -> Storage:
    from hypervisor.server.store.memory import MemoryStorage

    return MemoryStorage(clock)


BACKENDS: Mapping[str, Callable[[StoreConfig, Clock], Awaitable[Storage]]] = MappingProxyType(
    {
        "sqlite": _open_sqlite,
        "etcd": _open_etcd,
        "memory": _open_memory,
    }
)


async def open_storage(config: StoreConfig, clock: Clock, *, sessions: Sequence[str] = ()) -> Storage:
    """Open the store; close it with ``aclose``. Raises ``InvalidArgument`` for an unknown backend.

    ``sessions`` are prefixes of keys bound to leases of server processes. Where a store has one server at a time,
    having it open proves that whoever wrote them is dead: their leases are ended before this returns, so that nothing
    has to wait until they run out. In a shared store they may belong to living servers and are left alone.
    """
    try:
        opener = BACKENDS[config.backend]
    except KeyError:
        raise InvalidArgument.of_field(
            "store.backend", f"{config.backend!r} is unknown; choose one of {', '.join(sorted(BACKENDS))}"
        ) from None
    storage = await opener(config, clock)
    if config.backend in _ONE_SERVER:
        try:
            await _end_sessions(storage, sessions)
        except BaseException:
            await storage.aclose()
            raise
    return storage


async def _end_sessions(storage: Storage, prefixes: Sequence[str]) -> None:
    try:
        leases = {lease_id for prefix in prefixes for lease_id in await _leases_under(storage, prefix)}
        for lease_id in sorted(leases):
            await storage.revoke_lease(lease_id)
    except HypervisorError as exc:
        # A full disk must not keep the server from serving reads: the leases then end by themselves.
        log.warning("dead_sessions_not_ended", reason=exc.reason, error=str(exc))
    else:
        if leases:
            log.info("dead_sessions_ended", leases=len(leases))


async def _leases_under(storage: Storage, prefix: str) -> set[str]:
    leases: set[str] = set()
    start, revision = "", None
    while True:
        page = await storage.list(prefix, start_key=start, revision=revision)
        leases.update(item.lease_id for item in page.items if item.lease_id)
        start, revision = page.next_key, page.revision
        if not start:
            return leases
