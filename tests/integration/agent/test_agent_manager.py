"""The manager's promises, over the fake driver and a real journal."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hvtest_agent_waiting import until, within
from hvtest_node import assignment, node_under_test, ref
from hypervisor.agent.console import ConsoleHub
from hypervisor.agent.console_items import End, Ended, Output
from hypervisor.agent.disk import Disk
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines
from hypervisor.core.clock import SystemClock
from hypervisor.core.consoles import ConsoleOptions
from hypervisor.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from hypervisor.core.model import DriverInfo
from hypervisor.core.states import InstanceStatus, InstanceType


async def test_create_with_start_runs_the_instance(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        seen = await node.manager.create(assignment(), start=True)

        assert seen.status is InstanceStatus.RUNNING
        assert await node.manager.list() == (seen,)


async def test_create_without_start_leaves_it_stopped(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        seen = await node.manager.create(assignment(), start=False)

        assert (seen.status, seen.started_at) == (InstanceStatus.STOPPED, None)


async def test_a_repeated_create_answers_the_same_and_makes_nothing(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()

        first = await node.manager.create(wanted, start=True)
        again = await node.manager.create(wanted, start=True)

        assert again == first


async def test_a_repeated_create_does_not_restart_what_ended_meanwhile(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment(command=("exit", "4"))

        await node.manager.create(wanted, start=True)
        again = await node.manager.create(wanted, start=True)

        assert (again.status, again.exit_code) == (InstanceStatus.FAILED, 4)


async def test_an_exit_that_overtakes_the_start_is_what_the_create_answers(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        seen = await node.manager.create(assignment(command=("exit", "3")), start=True)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "EXITED", 3)


@pytest.mark.parametrize("verb", ["create", "start", "stop", "restart", "delete"])
async def test_a_call_with_an_older_epoch_is_refused(tmp_path: Path, verb: str) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment(epoch=5)
        await node.manager.create(wanted, start=True)
        old = ref(wanted, epoch=4)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "create": lambda: node.manager.create(assignment(wanted.instance_id, epoch=4), start=True),
            "start": lambda: node.manager.start(old),
            "stop": lambda: node.manager.stop(old, grace_s=0.0),
            "restart": lambda: node.manager.restart(old, grace_s=0.0),
            "delete": lambda: node.manager.delete(old, grace_s=0.0),
        }

        with pytest.raises(FailedPrecondition) as caught:
            await calls[verb]()

        assert caught.value.reason == "STALE_EPOCH"
        assert caught.value.metadata["known_epoch"] == "5"
        assert (await node.manager.look(wanted.instance_id)).status is InstanceStatus.RUNNING


@pytest.mark.parametrize("was_here", [True, False])
async def test_a_create_that_comes_after_the_delete_is_refused(tmp_path: Path, *, was_here: bool) -> None:
    """Seed 64: the network had held it back. Also where the create never came before, and after a restart."""
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        if was_here:
            await node.manager.create(wanted, start=True)
        assert await node.manager.delete(ref(wanted), grace_s=0.0) is was_here
    async with node_under_test(tmp_path) as node:
        with pytest.raises(FailedPrecondition) as caught:
            await node.manager.create(wanted, start=True)

        assert caught.value.reason == "STALE_EPOCH"
        assert await node.manager.list() == ()


async def test_a_create_that_failed_and_was_undone_may_be_asked_for_again(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        node.driver.faults.fail("start", Internal("no"), times=1)
        with pytest.raises(Internal):
            await node.manager.create(wanted, start=True)

        assert (await node.manager.create(wanted, start=True)).status is InstanceStatus.RUNNING


async def test_a_create_that_cannot_be_undone_says_that_something_is_left(tmp_path: Path) -> None:
    """Seed 236: its server must not take it for one that has begun nothing."""
    async with node_under_test(tmp_path) as node:
        gone = Unavailable("the runtime is away", reason="DRIVER_UNAVAILABLE")
        node.driver.faults.fail("start", gone, times=1)
        node.driver.faults.fail("delete", gone, times=1)

        with pytest.raises(Unavailable) as caught:
            await node.manager.create(assignment(), start=True)

        assert caught.value.reason == "DRIVER_UNAVAILABLE"
        assert caught.value.metadata["left"] == "true"


async def test_an_older_epoch_stays_refused_after_the_delete_and_a_restart(tmp_path: Path) -> None:
    wanted = assignment(epoch=5)
    async with node_under_test(tmp_path) as node:
        await node.manager.create(wanted, start=True)
        await node.manager.delete(ref(wanted), grace_s=0.0)
    async with node_under_test(tmp_path) as node:
        with pytest.raises(FailedPrecondition) as caught:
            await node.manager.create(assignment(wanted.instance_id, epoch=4), start=True)

        assert caught.value.reason == "STALE_EPOCH"
        assert await node.manager.list() == ()


async def test_a_create_with_a_newer_epoch_replaces_the_old_copy(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        old = assignment()
        first = await node.manager.create(old, start=True)

        second = await node.manager.create(assignment(old.instance_id, epoch=2), start=True)

        assert second.epoch == 2
        assert second.sequence > first.sequence
        assert second.started_at != first.started_at


async def test_another_generation_is_refused_by_name(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment(generation=2)
        await node.manager.create(wanted, start=True)

        with pytest.raises(FailedPrecondition) as caught:
            await node.manager.stop(ref(wanted, generation=1), grace_s=0.0)

        assert caught.value.reason == "GENERATION_MISMATCH"


async def test_an_instance_that_is_not_here_is_not_found(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        for call in (
            node.manager.start(ref(assignment())),
            node.manager.stop(ref(assignment()), grace_s=0.0),
            node.manager.restart(ref(assignment()), grace_s=0.0),
            node.manager.stats_source(assignment().instance_id),
        ):
            with pytest.raises(NotFound) as caught:
                await call
            assert caught.value.reason == "INSTANCE_NOT_FOUND"


async def test_deleting_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        assert await node.manager.delete(ref(assignment()), grace_s=0.0) is False


async def test_delete_leaves_nothing_in_driver_journal_and_list(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        await node.manager.create(wanted, start=True)

        assert await node.manager.delete(ref(wanted), grace_s=1.0) is True

        assert await node.driver.list() == ()
        assert await node.manager.list() == ()
        assert node.told.gone == [wanted.instance_id]
    async with node_under_test(tmp_path) as node:
        assert dict(node.journal.entries) == {}


@pytest.mark.parametrize("failing", ["create", "start"])
async def test_a_failed_create_leaves_nothing(tmp_path: Path, failing: str) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        node.driver.faults.fail(failing, InvalidArgument("no such program", reason="COMMAND_INVALID"))

        with pytest.raises(InvalidArgument) as caught:
            await node.manager.create(wanted, start=True)

        assert caught.value.reason == "COMMAND_INVALID"
        assert await node.driver.list() == ()
        assert await node.manager.list() == ()
    async with node_under_test(tmp_path) as node:
        assert dict(node.journal.entries) == {}


async def test_a_create_whose_undo_fails_is_undone_when_the_runtime_is_back(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        node.driver.faults.fail("start", Unavailable("gone", reason="DRIVER_UNAVAILABLE"))
        node.driver.faults.fail("delete", Unavailable("gone", reason="DRIVER_UNAVAILABLE"))

        with pytest.raises(Unavailable):
            await node.manager.create(assignment(), start=True)

        assert await node.manager.list() == ()
        assert len(await node.driver.list()) == 1
        node.driver.faults.lose_runtime()
        await until(lambda: not node.health.available("fake"), what="the loss is noticed")
        node.driver.faults.restore_runtime()
        await until(lambda: not node.driver._instances, what="the rest of the create is removed")


async def test_a_driver_defect_becomes_internal_and_the_next_call_works(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)
        node.driver.faults.fail("stop", KeyError("a defect"))

        with pytest.raises(Internal) as caught:
            await node.manager.stop(ref(wanted), grace_s=0.0)

        assert caught.value.reason == "DRIVER_DEFECT"
        assert (await node.manager.stop(ref(wanted), grace_s=0.0)).status is InstanceStatus.STOPPED


async def test_a_hanging_driver_hits_its_deadline_and_other_instances_go_on(tmp_path: Path) -> None:
    deadlines = DriverDeadlines(create_s=0.2, action_s=0.2, query_s=0.2, abandon_s=0.05)
    async with node_under_test(tmp_path, deadlines=deadlines) as node:
        stuck, other = assignment(), assignment()
        await node.manager.create(stuck, start=True)
        node.driver.faults.hang("stop")

        stopping = asyncio.ensure_future(node.manager.stop(ref(stuck), grace_s=0.0))
        created = await within(node.manager.create(other, start=True), what="another instance is made")

        assert created.status is InstanceStatus.RUNNING
        with pytest.raises(DeadlineExceeded) as caught:
            await stopping
        assert caught.value.reason == "DRIVER_TIMEOUT"
        seen = {o.instance_id: o for o in await node.manager.list()}
        assert seen[stuck.instance_id].status is InstanceStatus.RUNNING


async def test_a_missing_capability_is_told_before_the_driver_is_asked(tmp_path: Path) -> None:
    clock = SystemClock()
    driver = FakeDriver(FakeConfig(lacks=(("restart", "it is too simple"),)), clock=clock)
    async with node_under_test(tmp_path, driver=driver) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)
        driver.faults.fail("restart", AssertionError("asked"))

        with pytest.raises(Unimplemented) as caught:
            await node.manager.restart(ref(wanted), grace_s=0.0)

        assert caught.value.reason == "CAPABILITY_MISSING"
        assert "it is too simple" in caught.value.message


async def test_a_type_without_a_driver_is_refused_with_the_reason(tmp_path: Path) -> None:
    missing = DriverInfo(
        name="libvirt", types=(InstanceType.VM,), available=False, reason="comes with the libvirt driver"
    )
    async with node_under_test(tmp_path, missing=(missing,)) as node:
        with pytest.raises(Unimplemented) as caught:
            await node.manager.create(assignment(kind=InstanceType.VM), start=True)

        assert caught.value.reason == "CAPABILITY_MISSING"
        assert "comes with the libvirt driver" in caught.value.message
        assert missing in node.health.infos()


async def test_a_create_while_the_runtime_is_down_says_so_and_begins_nothing(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        node.driver.faults.lose_runtime("containerd is not running")
        await until(lambda: not node.health.available("fake"), what="the loss is noticed")

        with pytest.raises(Unavailable) as caught:
            await node.manager.create(assignment(), start=True)

        assert caught.value.reason == "DRIVER_UNAVAILABLE"
        assert "containerd is not running" in caught.value.message
    async with node_under_test(tmp_path) as node:
        assert dict(node.journal.entries) == {}


async def test_calls_for_one_instance_are_served_one_after_another(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        node.driver.faults.hang("create")
        creating = asyncio.ensure_future(node.manager.create(wanted, start=True))
        await until(lambda: node.manager.last_seen(), what="the create began")
        stopping = asyncio.ensure_future(node.manager.stop(ref(wanted), grace_s=0.0))

        node.driver.faults.release("create")

        assert (await creating).status is InstanceStatus.RUNNING
        assert (await stopping).status is InstanceStatus.STOPPED


async def test_an_action_under_way_is_shown_as_such(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)
        node.driver.faults.hang("stop")
        stopping = asyncio.ensure_future(node.manager.stop(ref(wanted), grace_s=0.0))

        await until(
            lambda: [o.status for o in node.manager.last_seen()] == [InstanceStatus.STOPPING],
            what="the instance is shown as stopping",
        )

        assert [o.status for o in await node.manager.list()] == [InstanceStatus.STOPPING]
        node.driver.faults.release("stop")
        assert (await stopping).status is InstanceStatus.STOPPED


async def test_an_action_goes_on_when_its_caller_leaves_and_is_reported(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        node.driver.faults.hang("start")
        creating = asyncio.ensure_future(node.manager.create(wanted, start=True))
        await until(lambda: node.manager.last_seen(), what="the create began")

        creating.cancel()
        await asyncio.wait({creating})
        node.driver.faults.release("start")

        reported = await until(lambda: node.told.reports, what="the outcome is reported")
        assert reported[-1].status is InstanceStatus.RUNNING


async def test_an_exit_is_reported_with_a_rising_sequence(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        running = await node.manager.create(wanted, start=True)

        await node.driver.exit(wanted.instance_id, 9)

        reported = await until(lambda: node.told.reports, what="the exit is reported")
        assert (reported[0].status, reported[0].exit_code) == (InstanceStatus.FAILED, 9)
        assert reported[0].sequence > running.sequence


async def test_an_oom_kill_is_reported_with_its_reason(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)

        await node.driver.oom(wanted.instance_id)

        reported = await until(lambda: node.told.reports, what="the kill is reported")
        assert (reported[0].status, reported[0].reason) == (InstanceStatus.FAILED, "OOM_KILLED")


async def test_an_answered_stop_is_not_reported_besides(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)
        await node.manager.stop(ref(wanted), grace_s=1.0)

        await node.driver.delete(assignment().instance_id)  # Lets the events consumer run.
        await node.manager.list()

        assert node.told.reports == []


async def test_what_happened_while_the_runtime_was_away_is_reported_when_it_is_back(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)
        node.driver.faults.lose_runtime()
        await until(lambda: not node.health.available("fake"), what="the loss is noticed")
        await node.driver.exit(wanted.instance_id, 2)

        node.driver.faults.restore_runtime()

        reported = await until(lambda: node.told.reports, what="the exit is reported")
        assert reported[-1].exit_code == 2


async def test_a_hundred_creates_at_once_share_their_syncs(tmp_path: Path) -> None:
    class CountingDisk(Disk):
        syncs = 0

        def sync(self, fd: int) -> None:
            CountingDisk.syncs += 1
            super().sync(fd)

    async with node_under_test(tmp_path, disk=CountingDisk()) as node:
        before = CountingDisk.syncs

        seen = await asyncio.gather(*(node.manager.create(assignment(), start=True) for _ in range(100)))

        assert {o.status for o in seen} == {InstanceStatus.RUNNING}
        assert len({o.sequence for o in seen}) == 100
        assert CountingDisk.syncs - before < 20


async def test_an_exit_during_an_action_that_fails_is_reported(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)
        node.driver.faults.hang("stop")
        stopping = asyncio.ensure_future(node.manager.stop(ref(wanted), grace_s=0.0))
        await until(
            lambda: [o.status for o in node.manager.last_seen()] == [InstanceStatus.STOPPING],
            what="the stop began",
        )
        await node.driver.exit(wanted.instance_id, 3)
        node.driver.faults.fail("stop", KeyError("a defect"))

        node.driver.faults.release("stop")

        with pytest.raises(Internal):
            await stopping
        assert [(o.status, o.exit_code) for o in node.told.reports] == [(InstanceStatus.FAILED, 3)]


async def test_a_registration_tells_everything_as_new_observations(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        created = await node.manager.create(assignment(), start=True)

        (again,) = node.manager.for_registration()

        assert again.sequence > created.sequence
        assert (again.status, again.started_at) == (created.status, created.started_at)


async def test_epochs_of_deleted_instances_are_remembered_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypervisor.agent.drivers.instances.TOMBSTONES", 3)
    deleted = [assignment(epoch=2) for _ in range(4)]
    async with node_under_test(tmp_path) as node:
        for wanted in deleted:
            await node.manager.create(wanted, start=False)
            await node.manager.delete(ref(wanted), grace_s=0.0)

        gone = [node.manager._instances.epoch_gone(wanted.instance_id) for wanted in deleted]

    assert gone == [0, 2, 2, 2]


async def test_a_defect_in_a_console_lets_its_viewers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def defect(*_: object) -> bool:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(ConsoleHub, "_end_seen", defect)
    async with node_under_test(tmp_path) as node:
        wanted = assignment()
        await node.manager.create(wanted, start=True)
        hub = node.consoles.hub(wanted.instance_id)
        async with hub.view(ConsoleOptions(read_only=True)) as viewer:
            await node.driver.exit(wanted.instance_id, 0)

            async def last() -> Output:
                return [item async for item in viewer.output()][-1]

            assert await within(last(), what="the viewer ends") == Ended(End.DETACHED)
