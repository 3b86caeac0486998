"""Whatever happens, in whatever order, on however many servers: what is reserved is the sum of what is placed."""

import asyncio
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvtest_agent import MemoryAgent, MemoryAgents
from hvtest_control_plane import allocation_is_sum, control_plane, draft, mutation, registration
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import HypervisorError, Internal, InvalidArgument
from hypervisor.core.states import TRANSITIONAL, InstanceStatus
from hypervisor.server import keys
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings
from hypervisor.server.drafts import Batch
from hypervisor.server.scheduler.judge import Judge
from hypervisor.server.services import Caller, HeartbeatTimes, InstanceRef, NodeRegistration, StopOptions
from hypervisor.server.store.memory import MemoryStorage

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["create", "delete", "stop", "start", "restart", "exit", "fail", "unreachable", "cancel", "again"]
        ),
        st.integers(0, 5),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=25,
)


def patient(base: ControlPlaneSettings) -> ControlPlaneSettings:
    return replace(
        base,
        heartbeat=HeartbeatTimes(10.0, 60.0),
        server_ttl_s=60.0,
        executor=replace(base.executor, create_s=0.2, start_s=0.2, stop_s=0.2, delete_s=0.2, slow_s=0.01),
    )


async def step(
    planes: tuple[ControlPlane, ControlPlane],
    agent: MemoryAgent,
    node: NodeRegistration,
    what: tuple[str, int, int],
) -> None:
    verb, number, server = what
    plane = planes[server]
    ref, at_once = InstanceRef(f"i{number}"), StopOptions(0.0)
    try:
        match verb:
            case "create":
                await plane.instances.create(
                    draft(f"i{number}", cpu_cores=1 + number / 2), mutation(f"r-{number}-{server}")
                )
            case "again":
                await plane.instances.create(
                    draft(f"i{number}", cpu_cores=1 + number / 2), mutation(f"r-{number}-0", wait=False)
                )
            case "delete":
                await plane.instances.delete(ref, mutation(), options=at_once, force=True)
            case "stop":
                await plane.instances.stop(ref, mutation(), options=at_once)
            case "start":
                await plane.instances.start(ref, mutation())
            case "restart":
                await plane.instances.restart(ref, mutation(), options=at_once)
            case "exit":
                ids = sorted(agent.held)
                if ids:
                    seen = agent.end(ids[number % len(ids)], exit_code=number % 2)
                    await plane.nodes.update_status(
                        node.id, node.incarnation, drivers=None, observations=(seen,)
                    )
            case "fail":
                agent.failures[("create", "start", "stop", "delete")[number % 4]] = InvalidArgument("told to")
            case "unreachable":
                agent.unreachable = not agent.unreachable
            case "cancel":
                await plane.operations.cancel(f"r-{number}-{server}", Caller("alice", "x"))
    except Internal:
        raise  # a defect
    except HypervisorError:
        pass  # refusals and failures are part of the story


def table_agrees(plane: ControlPlane) -> None:
    """What was followed through all commits, conflicts and failures is what is there, and the choice is made on it."""
    batch = Batch(plane.committer.known, now=SystemClock().now())
    probe = batch.draft()
    for cpu_cores in (0.5, 2.0, 5.0):
        order = draft("probe", cpu_cores=cpu_cores)
        snapshot = plane.placer.look(probe, order)
        for node_id, state in snapshot.nodes.items():
            held = probe.peek(keys.allocation(node_id))
            assert held is not None
            assert (state.reserved, state.instances) == (held.value.reserved, held.value.instances)
        for instance_id in {*snapshot.instances, *(i.value.id for i in plane.view.instances())}:
            assert (instance_id in snapshot.instances) == (probe.peek(keys.instance(instance_id)) is not None)
        request = plane.placer.request(order, seed="probe")
        assert plane.placer.scheduler.schedule(request, snapshot) == Judge().schedule(request, snapshot)


async def history(steps: list[tuple[str, int, int]]) -> None:
    storage, agents = MemoryStorage(SystemClock()), MemoryAgents()
    node = registration(cpu_cores=6)
    async with (
        control_plane(storage, agents, server_id="s-1", change=patient) as one,
        control_plane(storage, agents, server_id="s-2", change=patient) as two,
    ):
        await one.nodes.register(node)
        await two.view.wait_revision(one.view.revision)
        agent = agents.agent(one.nodes.resolve(node.id).value)
        pending: list[asyncio.Task[None]] = []
        for what in steps:
            pending.append(asyncio.create_task(step((one, two), agent, node, what)))
            await asyncio.sleep(0)
            if len(pending) % 3 == 0:
                await allocation_is_sum(storage)
            table_agrees(one)
            table_agrees(two)
        await asyncio.gather(*pending)
        await allocation_is_sum(storage)

        # Left alone with a reachable agent, everything settles, and what is recorded is what is there.
        agent.unreachable = False
        agent.failures.clear()
        async with asyncio.timeout(20):
            while True:
                await one.view.wait_revision(await storage.current_revision())
                instances = [i.value for i in one.view.instances()]
                unsettled = TRANSITIONAL | {InstanceStatus.UNKNOWN}
                if not any(i.operation_id or i.status in unsettled for i in instances):
                    break
                await asyncio.sleep(0.01)
        table_agrees(one)
        table_agrees(two)
        held = await allocation_is_sum(storage)
        assert held[node.id].reserved.fits_in(node.resources.capacity)
        assert {i.id for i in instances if i.status_reason != "LOST"} == agent.holds()
    await storage.aclose()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_reserved_is_always_the_sum_of_what_is_placed(steps: list[tuple[str, int, int]]) -> None:
    asyncio.run(history(steps))
