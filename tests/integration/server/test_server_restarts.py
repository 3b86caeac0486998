"""Servers that are started again: after they died on their embedded store, and after their store was replaced."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from hvtest_agent import MemoryAgents
from hvtest_control_plane import (
    add_node,
    allocation_is_sum,
    control_plane,
    draft,
    mutation,
    registration,
    until,
)
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.states import OperationState
from hypervisor.server import keys
from hypervisor.server.control_plane import ControlPlaneSettings
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import Put
from hypervisor.server.view import StoreView, ViewSettings


def leases_that_outlast_the_test(settings: ControlPlaneSettings) -> ControlPlaneSettings:
    return replace(settings, server_ttl_s=600.0, reconciler=replace(settings.reconciler, leader_ttl_s=600.0))


async def test_a_restarted_server_takes_over_from_its_dead_self_at_once(tmp_path: Path) -> None:
    config = StoreConfig(path=str(tmp_path / "store.db"))
    agents, joining = MemoryAgents(), registration()
    storage = await open_storage(config, SystemClock(), sessions=keys.SESSIONS)
    async with control_plane(storage, agents, server_id="s-1", change=leases_that_outlast_the_test) as dying:
        await dying.nodes.register(joining)
        agents.agent(dying.nodes.resolve(joining.id).value).gates["create"] = asyncio.Event()
        await dying.instances.create(draft("web"), mutation("r-1", wait=False))
        await until(lambda: bool(agents.by_node[joining.id].calls) and dying.view.leader_id() == "s-1")
        # Without its store it can neither resign nor leave, as if it had been killed.
        await storage.aclose()
    agents.by_node[joining.id].gates.clear()

    storage = await open_storage(config, SystemClock(), sessions=keys.SESSIONS)
    async with (
        control_plane(storage, agents, server_id="s-2", change=leases_that_outlast_the_test) as plane,
        add_node(plane, joining),
    ):
        done = await plane.operations.wait("r-1", timeout_s=10)

        assert (done.value.state, done.value.server_id) == (OperationState.SUCCEEDED, "s-2")
        assert [server.id for server in plane.view.servers()] == ["s-2"]
        assert plane.view.leader_id() == "s-2"
        await allocation_is_sum(storage)
    await storage.aclose()


async def test_leases_of_agents_outlive_a_restart_of_the_server(tmp_path: Path) -> None:
    config = StoreConfig(path=str(tmp_path / "store.db"))
    joining = registration()
    storage = await open_storage(config, SystemClock(), sessions=keys.SESSIONS)
    async with control_plane(storage, MemoryAgents()) as plane:
        await plane.nodes.register(joining)
    await storage.aclose()

    storage = await open_storage(config, SystemClock(), sessions=keys.SESSIONS)

    assert await storage.get(keys.node_lease(joining.id).path) is not None
    await storage.aclose()


class RestoredStorage(MemoryStorage):
    """A store that was restored from a backup of its beginning while servers ran on it."""

    restored = False

    async def current_revision(self) -> int:
        return 1 if self.restored else await super().current_revision()


async def test_a_server_whose_store_went_back_ends_instead_of_serving_what_is_not_true() -> None:
    storage = RestoredStorage(SystemClock())
    for value in (b"1", b"2", b"3"):
        await storage.commit([], [Put("/hypervisor/later", value)])
    view = StoreView(storage, SystemClock(), settings=ViewSettings(verify_interval_s=0.02, retry_s=0.02))
    running = asyncio.create_task(view.run())
    await view.loaded()

    storage.restored = True
    async with asyncio.timeout(10):
        await asyncio.wait({running})

    with pytest.raises(BaseExceptionGroup) as ended:
        running.result()
    replaced, _ = ended.value.split(FailedPrecondition)
    assert replaced is not None
    assert [error.reason for error in replaced.exceptions] == ["STORE_REPLACED"]
    await storage.aclose()
