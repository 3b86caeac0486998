"""The stores that the control plane's tests run on."""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hvtest_etcd import EtcdServer
from hypervisor.core.clock import SystemClock
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import Storage


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    """A store of the test's own, empty."""
    with ExitStack() as stack:
        endpoints: tuple[str, ...] = ()
        if request.param == "etcd":
            endpoints = (stack.enter_context(EtcdServer(tmp_path)).endpoint,)
        config = StoreConfig(backend=request.param, path=str(tmp_path / "store.db"), endpoints=endpoints)
        opened = await open_storage(config, SystemClock())
        yield opened
        await opened.aclose()
