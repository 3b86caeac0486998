"""Which backends there are, and opening the one the configuration names."""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from hypervisor.core.clock import Clock
from hypervisor.core.errors import InvalidArgument
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.storage import Storage

__all__ = ["BACKENDS", "open_storage"]


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


async def open_storage(config: StoreConfig, clock: Clock) -> Storage:
    """Open the store; close it with ``aclose``. Raises ``InvalidArgument`` for an unknown backend."""
    try:
        opener = BACKENDS[config.backend]
    except KeyError:
        raise InvalidArgument.of_field(
            "store.backend", f"{config.backend!r} is unknown; choose one of {', '.join(sorted(BACKENDS))}"
        ) from None
    return await opener(config, clock)
