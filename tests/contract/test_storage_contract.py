"""Every backend keeps the Storage contract."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hvtest_etcd import EtcdServer
from hvtest_storage_contract import StorageContract
from hypervisor.core.clock import SystemClock
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import Storage


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One server for all tests: starting one for each would take longer than the tests."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


class TestMemoryStorage(StorageContract):
    """The backend of tests and simulation."""

    @pytest.fixture
    async def storage(self) -> AsyncIterator[Storage]:
        storage = await open_storage(StoreConfig(backend="memory"), SystemClock())
        yield storage
        await storage.aclose()


class TestSqliteStorage(StorageContract):
    """The embedded backend."""

    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[Storage]:
        config = StoreConfig(backend="sqlite", path=str(tmp_path / "store.db"))
        storage = await open_storage(config, SystemClock())
        yield storage
        await storage.aclose()


class TestEtcdStorage(StorageContract):
    """The backend of several servers, against a real etcd."""

    @pytest.fixture
    async def storage(self, etcd: EtcdServer) -> AsyncIterator[Storage]:
        config = StoreConfig(backend="etcd", endpoints=(etcd.endpoint,))
        storage = await open_storage(config, SystemClock())
        yield storage
        await storage.aclose()
