"""What a restarted agent makes of its journal and of what runs."""

import asyncio
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvtest_agent_waiting import until, within
from hvtest_node import NodeUnderTest, assignment, node_under_test, ref
from hypervisor.agent.app import run_agent
from hypervisor.agent.config import AgentSettings
from hypervisor.agent.drivers.driver import Assignment, Handle
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines, GuardedDriver
from hypervisor.agent.drivers.health import OfferedDriver
from hypervisor.agent.drivers.registry import Drivers
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.journal import Journal
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import InvalidArgument, Unavailable
from hypervisor.core.ids import new_id
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus, InstanceType

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
LATER = datetime(2100, 1, 1, tzinfo=UTC)


def _fake(directory: Path) -> FakeDriver:
    return FakeDriver(FakeConfig(state_dir=directory / "fake"), clock=SystemClock())


async def _journalled(
    directory: Path,
    wanted: Assignment,
    phase: Phase,
    *,
    assignment: Assignment | None = None,
    start: bool = False,
    since: datetime = LATER,
) -> None:
    """The journal of an agent that was killed in the middle of something."""
    entry = Entry(
        instance_id=wanted.instance_id,
        driver="fake",
        generation=wanted.generation,
        epoch=wanted.epoch,
        phase=phase,
        since=since,
        assignment=assignment,
        start=start,
    )
    async with Journal(directory / "journal") as journal:
        await journal.put(entry)


async def _in_runtime(directory: Path, wanted: Assignment, *, running: bool) -> None:
    driver = _fake(directory)
    await driver.create(wanted)
    if running:
        await driver.start(wanted.instance_id)
    await driver.aclose()


async def test_a_running_instance_is_adopted_undisturbed(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        before = await node.manager.create(wanted, start=True)
    async with node_under_test(tmp_path) as node:
        (after,) = node.manager.last_seen()

        assert (after.status, after.started_at) == (InstanceStatus.RUNNING, before.started_at)
        assert after.sequence > before.sequence
        assert (await node.manager.stop(ref(wanted), grace_s=0.0)).status is InstanceStatus.STOPPED


async def test_an_exit_while_the_agent_was_away_is_reported(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        await node.manager.create(wanted, start=True)
    driver = _fake(tmp_path)
    await driver.list()
    await driver.exit(wanted.instance_id, 6)
    await driver.aclose()

    async with node_under_test(tmp_path) as node:
        assert [(o.status, o.exit_code) for o in node.told.reports] == [(InstanceStatus.FAILED, 6)]


async def test_what_the_runtime_lost_is_told_as_failed_and_can_be_deleted(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        await node.manager.create(wanted, start=True)
    driver = _fake(tmp_path)
    await driver.delete(wanted.instance_id)
    await driver.aclose()

    async with node_under_test(tmp_path) as node:
        (seen,) = node.manager.last_seen()
        assert (seen.status, seen.reason) == (InstanceStatus.FAILED, "RUNTIME_LOST")

        assert await node.manager.delete(ref(wanted), grace_s=0.0) is True

        assert await node.manager.list() == ()


async def test_one_of_ours_that_the_journal_does_not_know_is_found_and_can_be_deleted(tmp_path: Path) -> None:
    wanted = assignment(epoch=3)
    await _in_runtime(tmp_path, wanted, running=True)

    async with node_under_test(tmp_path) as node:
        (seen,) = node.manager.last_seen()
        assert (seen.instance_id, seen.epoch, seen.status) == (wanted.instance_id, 3, InstanceStatus.RUNNING)

        assert await node.manager.delete(ref(wanted), grace_s=0.0) is True

        assert await node.driver.list() == ()


async def test_a_create_cut_off_before_the_driver_was_asked_is_completed(tmp_path: Path) -> None:
    wanted = assignment()
    await _journalled(tmp_path, wanted, Phase.CREATING, assignment=wanted, start=True)

    async with node_under_test(tmp_path) as node:
        await until(lambda: node.told.reports, what="the create is completed")

        assert node.told.reports[-1].status is InstanceStatus.RUNNING


async def test_a_create_cut_off_after_the_start_does_not_start_again_what_ended(tmp_path: Path) -> None:
    wanted = assignment(command=("exit", "8"))
    await _in_runtime(tmp_path, wanted, running=True)
    await _journalled(tmp_path, wanted, Phase.CREATING, assignment=wanted, start=True)

    async with node_under_test(tmp_path) as node:
        await until(
            lambda: any(o.exit_code == 8 for o in node.told.reports),
            what="the end of the one run is reported",
        )

        (seen,) = await node.driver.list()
        assert seen.exit_code == 8


async def test_a_create_that_cannot_be_completed_is_undone_and_reported(tmp_path: Path) -> None:
    wanted = assignment(image="missing")
    await _journalled(tmp_path, wanted, Phase.CREATING, assignment=wanted, start=True)

    async with node_under_test(tmp_path) as node:
        reported = await until(
            lambda: [o for o in node.told.reports if o.reason == "CREATE_FAILED"],
            what="the failure is reported",
        )

        assert reported[0].status is InstanceStatus.FAILED
        assert await node.manager.list() == ()
        assert await node.driver.list() == ()


async def test_an_undo_cut_off_is_finished(tmp_path: Path) -> None:
    wanted = assignment()
    await _in_runtime(tmp_path, wanted, running=False)
    await _journalled(tmp_path, wanted, Phase.UNDOING)

    async with node_under_test(tmp_path) as node:
        await until(lambda: node.told.gone, what="the undo is finished")

        assert await node.driver.list() == ()


async def test_a_delete_cut_off_is_finished(tmp_path: Path) -> None:
    wanted = assignment()
    await _in_runtime(tmp_path, wanted, running=True)
    await _journalled(tmp_path, wanted, Phase.DELETING)

    async with node_under_test(tmp_path) as node:
        await until(lambda: node.told.gone, what="the delete is finished")

        assert await node.driver.list() == ()


async def test_a_stop_cut_off_is_finished(tmp_path: Path) -> None:
    wanted = assignment()
    await _in_runtime(tmp_path, wanted, running=True)
    await _journalled(tmp_path, wanted, Phase.STOPPING)

    async with node_under_test(tmp_path) as node:
        await until(
            lambda: node.told.reports and node.told.reports[-1].status is InstanceStatus.STOPPED,
            what="the stop is finished",
        )


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.RESTARTING])
async def test_a_start_cut_off_before_it_happened_is_made(tmp_path: Path, phase: Phase) -> None:
    wanted = assignment()
    await _in_runtime(tmp_path, wanted, running=False)
    await _journalled(tmp_path, wanted, phase)

    async with node_under_test(tmp_path) as node:
        await until(
            lambda: node.told.reports and node.told.reports[-1].status is InstanceStatus.RUNNING,
            what="the start is made",
        )


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.RESTARTING])
async def test_a_start_cut_off_after_it_happened_is_not_repeated(tmp_path: Path, phase: Phase) -> None:
    wanted = assignment(command=("exit", "2"))
    await _in_runtime(tmp_path, wanted, running=True)
    await _journalled(tmp_path, wanted, phase, since=LONG_AGO)

    async with node_under_test(tmp_path) as node:
        await until(lambda: _all_settled(node), what="the start is settled")

        (seen,) = await node.driver.list()
        assert seen.exit_code == 2


async def test_instances_of_a_runtime_that_is_down_are_adopted_when_it_is_back(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        before = await node.manager.create(wanted, start=True)
    driver = _fake(tmp_path)
    driver.faults.lose_runtime()

    async with node_under_test(tmp_path, driver=driver) as node:
        assert node.manager.for_registration() == (before,)
        driver.faults.restore_runtime()

        reported = await until(lambda: node.told.reports, what="the instance is adopted")
        assert reported[0].status is InstanceStatus.RUNNING
        assert reported[0].sequence > before.sequence
    await driver.aclose()


async def test_a_start_that_fails_for_good_leaves_the_instance_as_it_is(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path) as node:
        await node.manager.create(wanted, start=False)
        node.driver.faults.fail("start", InvalidArgument("no such program", reason="COMMAND_INVALID"))

        with pytest.raises(InvalidArgument):
            await node.manager.start(ref(wanted))

        (seen,) = await node.manager.list()
        assert seen.status is InstanceStatus.STOPPED


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.RESTARTING])
async def test_a_start_cut_off_that_the_driver_refuses_is_given_up(tmp_path: Path, phase: Phase) -> None:
    wanted = assignment()
    await _in_runtime(tmp_path, wanted, running=False)
    await _journalled(tmp_path, wanted, phase)
    driver = _fake(tmp_path)
    refusal = InvalidArgument("no such program", reason="COMMAND_INVALID")
    for verb in ("start", "restart"):
        driver.faults.fail(verb, refusal, times=100)

    async with node_under_test(tmp_path, driver=driver) as node:
        await until(lambda: _all_settled(node), what="the start is given up")

        assert node.told.reports[-1].status is InstanceStatus.STOPPED
        assert (await node.manager.stop(ref(wanted), grace_s=0.0)).status is InstanceStatus.STOPPED
    await driver.aclose()


async def test_a_stop_cut_off_of_what_the_runtime_lost_meanwhile_is_settled(tmp_path: Path) -> None:
    wanted = assignment()
    await _journalled(tmp_path, wanted, Phase.STOPPING)

    async with node_under_test(tmp_path) as node:
        await until(lambda: _all_settled(node), what="the stop is given up")

        (seen,) = node.manager.last_seen()
        assert (seen.status, seen.reason) == (InstanceStatus.FAILED, "RUNTIME_LOST")


async def test_what_a_runtime_loses_without_an_event_is_noticed_when_it_is_listed(tmp_path: Path) -> None:
    kept, gone = assignment(), assignment()
    async with node_under_test(tmp_path) as node:
        await node.manager.create(kept, start=True)
        await node.manager.create(gone, start=True)
        node.driver.vanish(gone.instance_id)

        seen = {o.instance_id: (o.status, o.reason) for o in await node.manager.list()}

        assert seen == {
            kept.instance_id: (InstanceStatus.RUNNING, ""),
            gone.instance_id: (InstanceStatus.FAILED, "RUNTIME_LOST"),
        }
        assert await node.manager.delete(ref(gone), grace_s=0.0) is True


async def test_calls_for_an_instance_whose_driver_is_not_enabled_any_more_say_so(tmp_path: Path) -> None:
    wanted = assignment()
    entry = Entry(
        instance_id=wanted.instance_id,
        driver="retired",
        generation=wanted.generation,
        epoch=wanted.epoch,
        phase=Phase.READY,
        since=LONG_AGO,
    )
    async with Journal(tmp_path / "journal") as journal:
        await journal.put(entry)

    async with node_under_test(tmp_path) as node:
        for call in (
            node.manager.stop(ref(wanted), grace_s=0.0),
            node.manager.delete(ref(wanted), grace_s=0.0),
            node.manager.stats_source(wanted.instance_id),
        ):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.reason == "DRIVER_UNAVAILABLE"
            assert "drivers.enabled" in caught.value.message


async def test_an_agent_told_to_stop_does_not_wait_for_a_runtime_that_hangs(tmp_path: Path) -> None:
    wanted = assignment()
    async with node_under_test(tmp_path / "agent") as node:
        await node.manager.create(wanted, start=True)
    asked, stop = asyncio.Event(), asyncio.Event()

    class Hanging(FakeDriver):
        async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
            asked.set()
            await asyncio.Event().wait()
            return None

    driver = Hanging(FakeConfig(state_dir=tmp_path / "agent" / "fake"), clock=SystemClock())
    guarded = GuardedDriver(driver, deadlines=DriverDeadlines(action_s=300.0, abandon_s=0.05))
    running = asyncio.ensure_future(
        run_agent(
            AgentSettings.model_validate(
                {"agent": {"port": 0, "data_dir": str(tmp_path / "agent")}, "metrics": {"address": ""}}
            ),
            stop=stop,
            clock=SystemClock(),
            rng=random.Random(1),
            new_id=new_id,
            version="1.2.3",
            drivers=Drivers((OfferedDriver(guarded, (InstanceType.CONTAINER,)),), ()),
        )
    )
    await within(asked.wait(), what="the adoption hangs")

    stop.set()

    await within(running, what="the agent ends")


def _all_settled(node: NodeUnderTest) -> bool:
    return all(s.entry is not None and s.entry.phase is Phase.READY for s in node.manager._instances.slots())
