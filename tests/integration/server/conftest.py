"""The stores that the control plane's tests run on."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.core.clock import SystemClock
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import Storage


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    config = StoreConfig(backend=request.param, path=str(tmp_path / "store.db"))
    opened = await open_storage(config, SystemClock())
    yield opened
    await opened.aclose()
