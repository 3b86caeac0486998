"""Restart policies on a node: over the fake driver and a real journal, without any server."""

from datetime import datetime
from pathlib import Path

from hvtest_agent_waiting import until, within
from hvtest_node import NodeUnderTest, assignment, node_under_test, ref
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.entries import Phase
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import Unavailable
from hypervisor.core.model import Observation
from hypervisor.core.restarts import RestartCondition, RestartPolicy
from hypervisor.core.states import InstanceStatus

QUICK = RestartPolicy(condition=RestartCondition.ON_FAILURE, initial_delay_s=0.1, max_delay_s=0.2)
SLOW = RestartPolicy(condition=RestartCondition.ON_FAILURE, initial_delay_s=3600.0, max_delay_s=3600.0)


def seen(node: NodeUnderTest, wanted: Assignment) -> Observation:
    found = {o.instance_id: o for o in node.manager.last_seen()}
    return found[wanted.instance_id]


def total(node: NodeUnderTest, wanted: Assignment) -> int:
    restarts = seen(node, wanted).restarts
    return 0 if restarts is None else restarts.total


def phase(node: NodeUnderTest, wanted: Assignment) -> Phase | None:
    entry = node.manager.described(wanted.instance_id)
    return None if entry is None else entry.phase


def next_at(node: NodeUnderTest, wanted: Assignment) -> datetime:
    restarts = seen(node, wanted).restarts
    assert restarts is not None
    assert restarts.next_at is not None
    return restarts.next_at


async def told(node: NodeUnderTest, wanted: Assignment, reason: str) -> None:
    await until(lambda: seen(node, wanted).reason == reason, what=reason)


async def runs_again(node: NodeUnderTest, wanted: Assignment, *, total_is: int) -> None:
    def probe() -> bool:
        return total(node, wanted) == total_is and seen(node, wanted).status is InstanceStatus.RUNNING

    await until(probe, what=f"running after {total_is} restarts")


async def test_a_crashed_instance_runs_again_and_the_count_is_told(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment(restart=QUICK)
        first = await node.manager.create(wanted, start=True)

        await node.driver.exit(wanted.instance_id, 3)
        await runs_again(node, wanted, total_is=1)

        again = seen(node, wanted)
        assert again.started_at != first.started_at
        assert again.restarts is not None
        assert (again.restarts.count, again.restarts.last_reason, again.restarts.last_exit_code) == (
            1,
            "EXITED",
            3,
        )
        reports = [(o.status, o.reason) for o in node.told.reports]
        assert reports == [(InstanceStatus.FAILED, "BACKOFF"), (InstanceStatus.RUNNING, "")]


async def test_one_that_fails_again_and_again_is_given_up(tmp_path: Path) -> None:
    policy = RestartPolicy(
        condition=RestartCondition.ON_FAILURE, max_restarts=2, initial_delay_s=0.1, max_delay_s=0.1
    )
    async with node_under_test(tmp_path) as node:
        wanted = assignment(command=("exit", "4"), restart=policy)
        created = await node.manager.create(wanted, start=True)

        await told(node, wanted, "RESTARTS_EXHAUSTED")

        assert created.reason == "BACKOFF"
        last = seen(node, wanted)
        assert (last.status, last.exit_code) == (InstanceStatus.FAILED, 4)
        assert last.restarts is not None
        assert (last.restarts.count, last.restarts.exhausted) == (2, True)


async def test_a_start_by_a_user_begins_to_count_anew(tmp_path: Path) -> None:
    policy = RestartPolicy(
        condition=RestartCondition.ON_FAILURE, max_restarts=1, initial_delay_s=0.1, max_delay_s=0.1
    )
    async with node_under_test(tmp_path) as node:
        wanted = assignment(command=("exit", "4"), restart=policy)
        await node.manager.create(wanted, start=True)
        await told(node, wanted, "RESTARTS_EXHAUSTED")

        started = await node.manager.start(ref(wanted))

        assert started.reason == "BACKOFF"
        await until(lambda: total(node, wanted) == 2, what="another restart")


async def test_an_end_without_failure_stays_and_always_restarts_it(tmp_path: Path) -> None:
    always = RestartPolicy(condition=RestartCondition.ALWAYS, initial_delay_s=0.1, max_delay_s=0.1)
    async with node_under_test(tmp_path) as node:
        stays, again = assignment(restart=QUICK), assignment(restart=always)
        for wanted in (stays, again):
            await node.manager.create(wanted, start=True)
            await node.driver.exit(wanted.instance_id, 0)

        await runs_again(node, again, total_is=1)

        assert (seen(node, stays).status, seen(node, stays).reason) == (InstanceStatus.STOPPED, "EXITED")
        assert total(node, stays) == 0


async def test_a_stop_cancels_the_restart_that_waits(tmp_path: Path) -> None:
    late = RestartPolicy(condition=RestartCondition.ALWAYS, initial_delay_s=1.0, max_delay_s=1.0)
    soon = RestartPolicy(condition=RestartCondition.ALWAYS, initial_delay_s=0.3, max_delay_s=0.3)
    async with node_under_test(tmp_path) as node:
        wanted, other = assignment(restart=soon), assignment(restart=late)
        await node.manager.create(other, start=True)
        await node.manager.create(wanted, start=True)
        await node.driver.exit(wanted.instance_id, 3)
        await told(node, wanted, "BACKOFF")

        stopped = await node.manager.stop(ref(wanted), grace_s=0.0)
        await node.driver.exit(other.instance_id, 3)
        await runs_again(node, other, total_is=1)  # by now the first would run as well

        assert stopped.reason == "EXITED"
        assert stopped.restarts is not None
        assert stopped.restarts.next_at is None
        assert total(node, wanted) == 0
        assert seen(node, wanted).status is InstanceStatus.FAILED


async def test_a_stop_is_no_end_that_is_restarted(tmp_path: Path) -> None:
    always = RestartPolicy(condition=RestartCondition.ALWAYS, initial_delay_s=0.1, max_delay_s=0.1)
    async with node_under_test(tmp_path) as node:
        stopped, suspended = assignment(restart=always), assignment(restart=always)
        for wanted in (stopped, suspended):
            await node.manager.create(wanted, start=True)
        await node.manager.stop(ref(stopped), grace_s=1.0)
        await node.manager.suspend(ref(suspended))
        other = assignment(restart=always)
        await node.manager.create(other, start=True)
        await node.driver.exit(other.instance_id, 3)
        await runs_again(node, other, total_is=1)

        for wanted in (stopped, suspended):
            assert seen(node, wanted).status is InstanceStatus.STOPPED
        assert (total(node, stopped), total(node, suspended)) == (0, 0)


async def test_a_delete_ends_it_while_it_waits(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment(restart=SLOW)
        await node.manager.create(wanted, start=True)
        await node.driver.exit(wanted.instance_id, 3)
        await told(node, wanted, "BACKOFF")

        await within(node.manager.delete(ref(wanted), grace_s=0.0), what="the delete")

        assert await node.manager.list() == ()


async def test_what_ended_while_the_agent_was_down_is_found_and_restarted(tmp_path: Path) -> None:
    clock = SystemClock()
    driver = FakeDriver(FakeConfig(state_dir=tmp_path / "fake"), clock=clock)
    crashed, stopped, never = assignment(restart=QUICK), assignment(restart=QUICK), assignment()
    async with node_under_test(tmp_path, driver=driver) as node:
        for wanted in (crashed, stopped, never):
            await node.manager.create(wanted, start=True)
        await node.manager.stop(ref(stopped), grace_s=0.0)
    for wanted in (crashed, never):
        await driver.exit(wanted.instance_id, 137)

    async with node_under_test(tmp_path, driver=driver) as node:
        await runs_again(node, crashed, total_is=1)

        assert seen(node, stopped).status is InstanceStatus.STOPPED
        assert seen(node, never).status is InstanceStatus.FAILED
    await driver.aclose()


async def test_a_restart_of_the_agent_keeps_count_and_time_of_the_next_restart(tmp_path: Path) -> None:
    clock = SystemClock()
    driver = FakeDriver(FakeConfig(state_dir=tmp_path / "fake"), clock=clock)
    wanted = assignment(restart=SLOW)
    async with node_under_test(tmp_path, driver=driver) as node:
        await node.manager.create(wanted, start=True)
        await driver.exit(wanted.instance_id, 3)
        await told(node, wanted, "BACKOFF")
        before = seen(node, wanted)

    async with node_under_test(tmp_path, driver=driver) as node:
        after = (await node.manager.list())[0]

        assert (after.reason, after.message) == (before.reason, before.message)
        assert after.restarts == before.restarts
    await driver.aclose()


async def test_an_agent_that_dies_in_the_midst_of_a_restart_neither_counts_nor_starts_it_twice(
    tmp_path: Path,
) -> None:
    clock = SystemClock()
    driver = FakeDriver(FakeConfig(state_dir=tmp_path / "fake"), clock=clock)
    wanted = assignment(restart=QUICK)
    async with node_under_test(tmp_path, driver=driver) as node:
        await node.manager.create(wanted, start=True)
        driver.faults.hang("start")
        await driver.exit(wanted.instance_id, 3)
        await until(lambda: phase(node, wanted) is Phase.STARTING, what="the restart begins")
    driver.faults.release("start")

    async with node_under_test(tmp_path, driver=driver) as node:
        await runs_again(node, wanted, total_is=1)
    await driver.aclose()


async def test_a_restart_waits_for_a_runtime_that_is_away_and_does_not_count_that(tmp_path: Path) -> None:
    policy = RestartPolicy(
        condition=RestartCondition.ON_FAILURE, max_restarts=1, initial_delay_s=0.5, max_delay_s=0.5
    )
    async with node_under_test(tmp_path) as node:
        wanted = assignment(restart=policy)
        await node.manager.create(wanted, start=True)
        await node.driver.exit(wanted.instance_id, 3)
        node.driver.faults.lose_runtime()
        await until(lambda: not node.health.available("fake"), what="the runtime is known to be away")
        due = next_at(node, wanted)
        await until(lambda: SystemClock().now() > due, what="the restart is due")
        node.driver.faults.restore_runtime()

        await runs_again(node, wanted, total_is=1)


async def test_a_restart_that_its_driver_refuses_is_tried_again(tmp_path: Path) -> None:
    async with node_under_test(tmp_path) as node:
        wanted = assignment(restart=QUICK)
        await node.manager.create(wanted, start=True)
        node.driver.faults.fail("start", Unavailable("no", reason="TEST"))
        await node.driver.exit(wanted.instance_id, 3)

        await runs_again(node, wanted, total_is=2)
