"""Placements through the whole control plane: every condition and preference, explanations, capacity, penalties."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

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
from hypervisor.core.errors import (
    FailedPrecondition,
    HypervisorError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from hypervisor.core.model import (
    AffinityTerm,
    Instance,
    InstancesUsage,
    LabelConstraint,
    NodeResources,
    SpreadTerm,
    Taint,
    Toleration,
)
from hypervisor.core.resources import GIB, Resources
from hypervisor.core.states import PlacementPolicy, TaintEffect, TolerationOperator
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings
from hypervisor.server.ledger import AllocationRules
from hypervisor.server.services import InstanceDraft, InstanceRef, NodeRegistration, StopOptions
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import Storage

WEB = (LabelConstraint(key="app", values=("web",)),)
GPU = Taint(key="gpu", value="yes", effect=TaintEffect.NO_SCHEDULE)


def labelled(name: str, app: str = "web", **changes: object) -> InstanceDraft:
    return replace(draft(name, **changes), labels={"app": app})  # type: ignore[arg-type]


def zoned(hostname: str, zone: str, **changes: object) -> NodeRegistration:
    return replace(registration(hostname, **changes), zone=zone)  # type: ignore[arg-type]


@asynccontextmanager
async def cluster(
    *nodes: NodeRegistration, settings: dict[str, object] | None = None, agents: MemoryAgents | None = None
) -> AsyncIterator[ControlPlane]:
    def change(base: ControlPlaneSettings) -> ControlPlaneSettings:
        return replace(base, **(settings or {}))  # type: ignore[arg-type]

    storage = MemoryStorage(SystemClock())
    async with (
        control_plane(storage, agents or MemoryAgents(), change=change) as plane,
        AsyncExitStack() as stack,
    ):
        for node in nodes:
            await stack.enter_async_context(add_node(plane, node))
        yield plane
        await allocation_is_sum(storage)
    await storage.aclose()


async def placed(plane: ControlPlane, order: InstanceDraft) -> str:
    """The host name of the node that a create chose."""
    await plane.instances.create(order, mutation())
    node_id = plane.instances.resolve(InstanceRef(order.name)).value.node_id
    return plane.nodes.resolve(node_id).value.hostname


async def test_required_anti_affinity_keeps_instances_apart_and_works_both_ways() -> None:
    apart = (AffinityTerm(selector=WEB),)
    async with cluster(registration("a"), registration("b")) as plane:
        first = await placed(plane, labelled("w1", anti_affinity=apart))
        second = await placed(plane, labelled("w2", anti_affinity=apart))
        assert {first, second} == {"a", "b"}

        with pytest.raises(ResourceExhausted, match="has an instance with app in \\(web\\)"):
            await plane.instances.create(labelled("w3", anti_affinity=apart), mutation())
        with pytest.raises(ResourceExhausted, match="that must not be with app in \\(web\\)"):
            await plane.instances.create(labelled("plain"), mutation())

        await placed(plane, labelled("db", "db"))
        await plane.instances.delete(InstanceRef("w2"), mutation(), options=StopOptions(0.0), force=True)
        assert await placed(plane, labelled("w4", anti_affinity=apart)) == second


async def test_one_batch_of_creates_keeps_apart_what_must_be_apart() -> None:
    """Decided together, committed together: each sees those before it."""
    apart = (AffinityTerm(selector=WEB),)
    async with cluster(*(registration(f"n{number}") for number in range(4))) as plane:
        ends = await asyncio.gather(
            *(placed(plane, labelled(f"w{number}", anti_affinity=apart)) for number in range(6)),
            return_exceptions=True,
        )

        assert sorted(e for e in ends if isinstance(e, str)) == ["n0", "n1", "n2", "n3"]
        assert [type(e) for e in ends if not isinstance(e, str)] == [ResourceExhausted] * 2


async def test_affinity_follows_to_the_zone_and_the_first_of_a_group_goes_anywhere() -> None:
    near = (AffinityTerm(selector=WEB, topology="hypervisor/zone"),)
    nodes = (zoned("a1", "a", cpu_cores=2), zoned("a2", "a"), zoned("b1", "b"), zoned("b2", "b"))
    async with cluster(*nodes) as plane:
        with pytest.raises(ResourceExhausted, match="has no instance with app in \\(web\\) in the same"):
            await plane.instances.create(labelled("other", "db", affinity=near), mutation())

        first = await placed(plane, labelled("w1", affinity=near))
        others = {await placed(plane, labelled(f"w{n}", affinity=near)) for n in (2, 3)}

        assert {host[0] for host in others} == {first[0]}


async def test_spread_over_zones_comes_before_the_policy() -> None:
    over = (SpreadTerm(selector=WEB),)
    nodes = (zoned("a1", "a", cpu_cores=64), zoned("a2", "a", cpu_cores=64), zoned("b1", "b", cpu_cores=8))
    async with cluster(*nodes) as plane:
        zones = [(await placed(plane, labelled(f"w{n}", spread=over, cpu_cores=0.5)))[0] for n in range(4)]

        assert sorted(zones) == ["a", "a", "b", "b"]


async def test_taints_keep_away_what_does_not_tolerate_them() -> None:
    tainted = replace(registration("gpu", cpu_cores=64), taints=(GPU,))
    async with cluster(tainted, registration("plain", cpu_cores=2)) as plane:
        assert await placed(plane, draft("one")) == "plain"
        tolerates = (Toleration(key="gpu", operator=TolerationOperator.EXISTS),)
        assert await placed(plane, draft("two", tolerations=tolerates)) == "gpu"
        with pytest.raises(
            ResourceExhausted, match="has the taint gpu=yes:no_schedule, which is not tolerated"
        ):
            await plane.instances.create(draft("three", node="gpu"), mutation())

        mild = Taint(key="old", effect=TaintEffect.PREFER_NO_SCHEDULE)
        await plane.nodes.taint("plain", mutation(), taint=mild, resource_version=0)
        await plane.nodes.taint("plain", mutation(), taint=mild, resource_version=0)
        assert await placed(plane, draft("four", tolerations=tolerates, cpu_cores=0.1)) == "gpu"
        assert plane.nodes.resolve("plain").value.taints == (mild,)

        await plane.nodes.register(tainted)
        await plane.nodes.untaint("plain", mutation(), key="old", effect=None, resource_version=0)
        assert plane.nodes.resolve("plain").value.taints == ()
        with pytest.raises(FailedPrecondition) as configured:
            await plane.nodes.untaint("gpu", mutation(), key="gpu", effect=None, resource_version=0)
        with pytest.raises(NotFound) as unknown:
            await plane.nodes.untaint("plain", mutation(), key="old", effect=None, resource_version=0)
        assert (configured.value.reason, unknown.value.reason) == ("TAINT_CONFIGURED", "TAINT_NOT_FOUND")


async def test_overcommit_and_reserve_bound_what_is_placed() -> None:
    rules = AllocationRules(overcommit_cpu=2.0, reserve=Resources(cpu_millis=1000, memory_bytes=GIB))
    async with cluster(registration("a", cpu_cores=3), settings={"allocation": rules}) as plane:
        for number in range(4):
            await placed(plane, draft(f"i{number}"))

        with pytest.raises(ResourceExhausted, match="needs 1 cores, 0 free of 4"):
            await plane.instances.create(draft("over"), mutation())
        with pytest.raises(ResourceExhausted, match="needs 8192 MiB of memory, 6912 free of 7168"):
            await plane.instances.create(draft("big", cpu_cores=0.001, memory_mb=8192), mutation())
        assert plane.nodes.allocatable(plane.nodes.resolve("a").value).cpu_millis == 4000


async def test_the_less_busy_of_equal_nodes_is_taken() -> None:
    busy, idle = registration("busy"), registration("idle")
    async with cluster(busy, idle) as plane:
        for node, used in ((busy, 4000), (idle, 0)):
            measured = NodeResources(
                cpu_millis=4000, cpu_used_millis=used, memory_bytes=8 * GIB, disk_bytes=100 * GIB
            )
            await plane.nodes.heartbeat(node.id, node.incarnation, measured, {}, usage=InstancesUsage())

        assert await placed(plane, draft("web")) == "idle"


async def test_a_node_that_has_the_image_is_preferred_among_near_equals() -> None:
    async with cluster(*(registration(f"n{number}", cpu_cores=64) for number in range(8))) as plane:
        first = await placed(plane, draft("one", cpu_cores=0.01, memory_mb=4))

        assert await placed(plane, draft("two", cpu_cores=0.01, memory_mb=4)) == first


async def test_a_node_whose_placements_keep_failing_is_ranked_down_and_comes_back() -> None:
    agents = MemoryAgents()
    async with cluster(registration("bad", cpu_cores=64), registration("good"), agents=agents) as plane:
        bad = plane.nodes.resolve("bad").value
        for number in range(2):
            agents.agent(bad).failures["create"] = Internal("the disk is full")
            with pytest.raises(Internal):
                await plane.instances.create(draft(f"f{number}", node="bad"), mutation())
        agents.agent(bad).failures["create"] = InvalidArgument("no such command")
        with pytest.raises(InvalidArgument):
            await plane.instances.create(draft("wrong", node="bad"), mutation())
        await until(lambda: plane.nodes.placements(bad.id) is not None)
        known = plane.nodes.placements(bad.id)
        assert known is not None
        assert (known.failures, known.last_failure) == (2, "the disk is full")
        assert 490 <= known.penalty <= 500

        assert await placed(plane, draft("one", cpu_cores=0.1)) == "good"
        found = await plane.explainer.would_be(draft("next"), node="bad")
        assert found.asked_node is not None
        penalties = [p.value for p in found.asked_node.parts if p.name == "penalty"]
        assert 500 <= penalties[0] <= 510

        # One that is made there all the same halves it.
        assert await placed(plane, draft("pinned", node="bad")) == "bad"
        better = plane.nodes.placements(bad.id)
        assert better is not None
        assert (better.failures, better.penalty <= 250) == (0, True)


async def test_another_server_sees_the_same_penalty() -> None:
    storage, agents = MemoryStorage(SystemClock()), MemoryAgents()
    node = registration("bad")
    async with control_plane(storage, agents, server_id="s-1") as one, add_node(one, node):
        agents.agent(one.nodes.resolve("bad").value).failures["create"] = Internal("broken")
        with pytest.raises(Internal):
            await one.instances.create(draft("web"), mutation())

        async with control_plane(storage, agents, server_id="s-2") as two:
            known = two.nodes.placements(node.id)

            assert known is not None
            assert (known.failures, known.last_failure) == (1, "broken")
    await storage.aclose()


async def test_explain_tells_record_alternatives_and_refusals() -> None:
    nodes = (registration("a"), registration("b", cpu_cores=2), registration("c", cpu_cores=0.5))
    async with cluster(*nodes) as plane:
        assert await placed(plane, draft("web", placement_policy=PlacementPolicy.SPREAD)) == "a"
        web = plane.instances.resolve(InstanceRef("web")).value

        found = await plane.explainer.instance(web, node="c")

        assert web.placement is not None
        assert web.placement.score == sum(p.value * p.weight for p in web.placement.parts)
        assert found.recorded == web.placement
        assert (found.hostname, found.best_node_id) == ("a", web.node_id)
        assert [(n.hostname, n.rank) for n in found.nodes] == [("a", 1), ("b", 2)]
        # Judged as if it were not there: 1 of 4 cores, and 64 MiB of 8 GiB.
        assert next(p.value for p in found.nodes[0].parts if p.name == "utilisation") == 872
        assert found.asked_node is not None
        assert [c.reason for c in found.asked_node.failed] == ["needs 1 cores, 0.5 free of 0.5"]
        assert [(r.filter, r.nodes) for r in found.refusals] == [("resources", 1)]

        await plane.nodes.cordon("a", mutation(), reason="disk", resource_version=0)
        later = await plane.explainer.instance(web, max_nodes=1)
        assert [(n.hostname, n.fits) for n in later.nodes] == [("b", True), ("a", False)]
        assert later.nodes[1].failed[0].reason == "is cordoned: disk"
        with pytest.raises(NotFound):
            await plane.explainer.instance(web, node="nowhere")


async def test_a_would_be_instance_that_fits_nowhere_is_told_all_checks_of_all_nodes() -> None:
    async with cluster(registration("a"), registration("b")) as plane:
        await plane.nodes.cordon("b", mutation(), reason="", resource_version=0)

        found = await plane.explainer.would_be(draft("huge", cpu_cores=9))

        assert (found.node_id, found.nodes_fit, found.nodes_considered) == ("", 0, 2)
        assert [(n.hostname, [c.filter for c in n.failed]) for n in found.nodes] == [
            ("a", ["resources"]),
            ("b", ["schedulable", "resources"]),
        ]
        with pytest.raises(HypervisorError) as refused:
            await plane.instances.create(draft("huge", cpu_cores=9), mutation())
        assert refused.value.reason == "NO_NODE_FITS"


async def test_capacity_is_what_then_really_fits() -> None:
    async with cluster(registration("a"), registration("b", cpu_cores=2), registration("c")) as plane:
        await plane.nodes.cordon("c", mutation(), reason="", resource_version=0)
        order = draft("any", cpu_cores=1.5)

        found = await plane.explainer.capacity(order, limit=100)

        assert (found.count, found.limit_reached) == (3, False)
        assert [(n.hostname, n.count, n.limit.filter if n.limit else "") for n in found.nodes] == [
            ("a", 2, "resources"),
            ("b", 1, "resources"),
            ("c", 0, "schedulable"),
        ]
        assert [(r.filter, r.nodes) for r in found.limits] == [("resources", 2), ("schedulable", 1)]
        few = await plane.explainer.capacity(order, limit=100, max_nodes=1)
        assert (few.count, len(few.nodes), few.nodes_considered) == (3, 1, 3)
        for number in range(3):
            await placed(plane, draft(f"i{number}", cpu_cores=1.5))
        with pytest.raises(ResourceExhausted):
            await plane.instances.create(draft("more", cpu_cores=1.5), mutation())
        assert (await plane.explainer.capacity(order, limit=100)).count == 0
        assert (await plane.explainer.capacity(draft("s", cpu_cores=0.25), limit=2)).limit_reached


async def test_capacity_heeds_what_the_instances_themselves_ask_for() -> None:
    nodes = (zoned("a1", "a"), zoned("a2", "a"), zoned("b1", "b"))
    async with cluster(*nodes) as plane:
        by_host = labelled("w", anti_affinity=(AffinityTerm(selector=WEB),))
        by_zone = labelled("w", anti_affinity=(AffinityTerm(selector=WEB, topology="hypervisor/zone"),))
        together = labelled(
            "w",
            affinity=(AffinityTerm(selector=WEB, topology="hypervisor/zone"),),
            placement_policy="binpack",
        )

        assert (await plane.explainer.capacity(by_host, limit=100)).count == 3
        assert (await plane.explainer.capacity(by_zone, limit=100)).count == 2
        # The first goes anywhere, all others to its zone.
        assert (await plane.explainer.capacity(together, limit=100)).count in (4, 8)
        assert (await plane.explainer.capacity(labelled("w"), limit=100)).count == 12


@pytest.mark.parametrize(("topology", "nodes"), [("hypervisor/zone", 8), ("hypervisor/hostname", 2)])
async def test_two_servers_at_once_keep_apart_what_must_be_apart(
    storage: Storage, topology: str, nodes: int
) -> None:
    """In a zone they choose different nodes, with no record in common but the register of such terms; on one node, the
    loser has to see the other's instance before it thinks again."""
    agents = MemoryAgents()
    apart = (AffinityTerm(selector=WEB, topology=topology),)
    async with (
        control_plane(storage, agents, server_id="s-1") as one,
        control_plane(storage, agents, server_id="s-2") as two,
        AsyncExitStack() as stack,
    ):
        for node in (zoned(f"{zone}{n}", zone) for zone in "ab" for n in range(nodes)):
            await stack.enter_async_context(add_node(one, node))
        await two.view.wait_revision(one.view.revision)
        for attempt in range(8):
            orders = [
                (
                    plane,
                    labelled(f"w{number}-{server}", anti_affinity=apart if (number + attempt) % 2 else ()),
                )
                for number in range(4)
                for server, plane in enumerate((one, two))
            ]

            ends = await asyncio.gather(
                *(plane.instances.create(order, mutation()) for plane, order in orders),
                return_exceptions=True,
            )

            assert {type(e) for e in ends if isinstance(e, BaseException)} <= {ResourceExhausted}
            await one.view.wait_revision(await storage.current_revision())
            there = [i.value for i in one.view.instances()]
            places = {i.name: _place(one, i, topology) for i in there}
            assert there
            for holder in (i for i in there if i.spec.anti_affinity):
                same = [name for name, place in places.items() if place == places[holder.name]]
                assert same == [holder.name]
            for instance in there:
                await one.instances.delete(
                    InstanceRef(instance.name), mutation(), options=StopOptions(0.0), force=True
                )
            await two.view.wait_revision(one.view.revision)


async def test_two_servers_at_once_begin_a_group_in_one_place(storage: Storage) -> None:
    agents = MemoryAgents()
    near = (AffinityTerm(selector=WEB, topology="hypervisor/zone"),)
    async with (
        control_plane(storage, agents, server_id="s-1") as one,
        control_plane(storage, agents, server_id="s-2") as two,
        AsyncExitStack() as stack,
    ):
        for node in (zoned(f"{zone}{n}", zone) for zone in "abcd" for n in range(3)):
            await stack.enter_async_context(add_node(one, node))
        await two.view.wait_revision(one.view.revision)

        await asyncio.gather(
            *(
                plane.instances.create(labelled(f"w{number}-{server}", affinity=near), mutation())
                for number in range(3)
                for server, plane in enumerate((one, two))
            )
        )

        await one.view.wait_revision(await storage.current_revision())
        zones = {_place(one, i.value, "hypervisor/zone") for i in one.view.instances()}
        assert len(zones) == 1


def _place(plane: ControlPlane, instance: Instance, topology: str) -> str:
    node = plane.nodes.resolve(instance.node_id).value
    return node.zone if topology == "hypervisor/zone" else node.hostname
