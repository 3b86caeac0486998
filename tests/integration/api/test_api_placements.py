"""Placements over real gRPC: taints, explanations, capacity, dry runs, and every refusal of bad input."""

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of, whole_agent
from hypervisor.v1 import cluster_pb2, compute_pb2, instance_pb2, node_pb2

Code = grpc.StatusCode
NO_SCHEDULE = instance_pb2.TAINT_EFFECT_NO_SCHEDULE
WEB = instance_pb2.LabelConstraint(key="app", values=["web"])


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, set[str]]:
    """Code, reason and wrong fields of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    error = failure_of(failed.value)
    return failed.value.code(), error.reason, {v.field for v in error.violations}


async def test_taints_are_set_shown_heeded_and_removed(server: WholeServer, agent: WholeAgent) -> None:
    taint = node_pb2.Taint(key="gpu", value="yes", effect=NO_SCHEDULE)

    done = await server.cluster.TaintNode(cluster_pb2.TaintNodeRequest(node="node-1", taint=taint))

    assert (done.verb, done.done, list(done.node.taints)) == ("taint", True, [taint])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await server.compute.CreateInstance(container("web"))
    assert "has the taint gpu=yes:no_schedule" in (refused.value.details() or "")
    tolerant = container("web")
    tolerant.instance.spec.tolerations.add(key="gpu", value="yes")
    made = await server.compute.CreateInstance(tolerant)
    assert list(made.instance.spec.tolerations) == [
        instance_pb2.Toleration(key="gpu", value="yes", operator=instance_pb2.Toleration.OPERATOR_EQUAL)
    ]
    done = await server.cluster.UntaintNode(cluster_pb2.UntaintNodeRequest(node="node-1", key="gpu"))
    assert (done.verb, list(done.node.taints)) == ("untaint", [])
    again = await refusal(
        server.cluster.UntaintNode(cluster_pb2.UntaintNodeRequest(node="node-1", key="gpu"))
    )
    assert again[:2] == (Code.NOT_FOUND, "TAINT_NOT_FOUND")


async def test_taints_of_the_agents_configuration(server: WholeServer, tmp_path: Path) -> None:
    async with whole_agent(server, tmp_path, taints=["gpu=yes:no_schedule", "old:prefer_no_schedule"]):
        node = await server.cluster.GetNode(cluster_pb2.GetNodeRequest(node="node-1"))
        code, reason, _ = await refusal(server.compute.CreateInstance(container("web")))
        kept = await refusal(
            server.cluster.UntaintNode(cluster_pb2.UntaintNodeRequest(node="node-1", key="gpu"))
        )

    assert [(t.key, t.value, t.effect, t.configured) for t in node.taints] == [
        ("gpu", "yes", NO_SCHEDULE, True),
        ("old", "", instance_pb2.TAINT_EFFECT_PREFER_NO_SCHEDULE, True),
    ]
    assert (code, reason) == (Code.RESOURCE_EXHAUSTED, "NO_NODE_FITS")
    assert kept[:2] == (Code.FAILED_PRECONDITION, "TAINT_CONFIGURED")


async def test_everything_wrong_with_terms_is_told_at_once(server: WholeServer, agent: WholeAgent) -> None:
    request = container("web")
    spec = request.instance.spec
    spec.tolerations.add(key="", value="x")
    spec.tolerations.add(key="a", value="b", operator=instance_pb2.Toleration.OPERATOR_EXISTS)
    spec.affinity.add()
    spec.affinity.add(selector=[WEB], topology="not a label!", weight=5)
    spec.anti_affinity.add(selector=[instance_pb2.LabelConstraint(key="app")], preferred=True, weight=101)
    spec.spread.add(selector=[WEB], weight=-1)
    spec.spread.extend([instance_pb2.SpreadTerm(selector=[WEB])] * 4)

    code, _, fields = await refusal(server.compute.CreateInstance(request))

    assert code is Code.INVALID_ARGUMENT
    at = "instance.spec."
    assert {field.removeprefix(at).partition(" ")[0] for field in fields} == {
        "tolerations[0].key",
        "tolerations[1].value",
        "affinity[0].selector",
        "affinity[1].topology",
        "affinity[1].weight",
        "anti_affinity[0].selector[0].values",
        "anti_affinity[0].weight",
        "spread[0].weight",
        "spread",
    }
    code, _, fields = await refusal(
        server.cluster.TaintNode(cluster_pb2.TaintNodeRequest(node="node-1", taint=node_pb2.Taint(value="-")))
    )
    assert (code, fields) == (Code.INVALID_ARGUMENT, {"taint.key", "taint.value", "taint.effect"})


async def test_terms_are_given_back_as_they_were_asked_for(server: WholeServer, agent: WholeAgent) -> None:
    request = container("web")
    request.instance.labels["app"] = "web"
    spec = request.instance.spec
    spec.affinity.add(selector=[WEB], topology="hypervisor/zone")
    spec.anti_affinity.add(selector=[WEB], preferred=True, weight=20)
    spec.spread.add(selector=[WEB])

    made = (await server.compute.CreateInstance(request)).instance

    assert made.spec.affinity[0].topology == "hypervisor/zone"
    assert (made.spec.anti_affinity[0].weight, made.spec.anti_affinity[0].preferred) == (20, True)
    assert (made.spec.spread[0].topology, made.spec.spread[0].weight) == ("hypervisor/zone", 100)
    assert made.placement.scheduler == "default"
    assert made.placement.score == sum(p.value * p.weight for p in made.placement.parts)
    names = [p.name for p in made.placement.parts]
    assert [name for name in names if name in ("affinity", "spread")] == ["spread", "affinity"]


async def test_an_explanation_of_what_is_there_and_of_what_would_be(
    server: WholeServer, agent: WholeAgent, tmp_path: Path
) -> None:
    await server.compute.CreateInstance(container("web"))
    async with whole_agent(server, tmp_path, hostname="node-2"):
        await server.cluster.CordonNode(cluster_pb2.CordonNodeRequest(node="node-2", reason="new disk"))

        there = await server.compute.ExplainPlacement(
            compute_pb2.ExplainPlacementRequest(instance="web", node="node-2")
        )
        would_be = await server.compute.ExplainPlacement(
            compute_pb2.ExplainPlacementRequest(would_be=container("").instance)
        )
        planned = container("next")
        planned.validate_only = True
        dry = await server.compute.CreateInstance(planned)

    assert (there.node_id, there.best_node_id, there.hostname) == (agent.node_id, agent.node_id, "node-1")
    assert there.recorded.score > 0
    assert (there.nodes_considered, there.nodes_fit) == (2, 1)
    assert [(c.filter, c.reason) for c in there.asked_node.failed] == [
        ("schedulable", "is cordoned: new disk")
    ]
    assert [(r.filter, r.nodes, r.hostname) for r in there.refusals] == [("schedulable", 1, "node-2")]
    assert (would_be.node_id, would_be.HasField("recorded")) == (agent.node_id, False)
    assert [n.hostname for n in dry.explanation.nodes] == ["node-1"]


async def test_capacity_of_a_node(server: WholeServer, agent: WholeAgent) -> None:
    node = await server.cluster.GetNode(cluster_pb2.GetNodeRequest(node="node-1"))
    order = container("").instance
    order.spec.cpu_cores = node.allocatable.cpu_cores / 2

    found = await server.cluster.GetClusterCapacity(cluster_pb2.GetClusterCapacityRequest(instance=order))
    limited = await server.cluster.GetClusterCapacity(
        cluster_pb2.GetClusterCapacityRequest(instance=order, count_limit=1)
    )

    assert (found.count, found.limit_reached) == (2, False)
    assert [(n.hostname, n.count, n.limit.filter) for n in found.nodes] == [("node-1", 2, "resources")]
    assert (limited.count, limited.limit_reached) == (1, True)


async def test_bad_questions_about_placements(server: WholeServer, agent: WholeAgent) -> None:
    compute, cluster = server.compute, server.cluster
    order = container("").instance

    async def explained(**fields: Any) -> tuple[grpc.StatusCode, str, set[str]]:
        return await refusal(compute.ExplainPlacement(compute_pb2.ExplainPlacementRequest(**fields)))

    assert (await explained())[2] == {"instance"}
    assert (await explained(instance="nope"))[:2] == (Code.NOT_FOUND, "INSTANCE_NOT_FOUND")
    assert (await explained(would_be=order, node="nope"))[:2] == (Code.NOT_FOUND, "NODE_NOT_FOUND")
    assert (await explained(would_be=order, max_nodes=1001))[2] == {"max_nodes"}
    typeless = instance_pb2.Instance(spec=order.spec)
    assert (await explained(would_be=typeless))[2] == {"would_be.type"}
    elsewhere = container("").instance
    elsewhere.project = "other"
    assert (await explained(would_be=elsewhere))[:2] == (Code.NOT_FOUND, "PROJECT_NOT_FOUND")
    capacity = cluster.GetClusterCapacity
    assert (await refusal(capacity(cluster_pb2.GetClusterCapacityRequest())))[2] == {"instance"}
    request = cluster_pb2.GetClusterCapacityRequest(instance=order, count_limit=100_001)
    assert (await refusal(capacity(request)))[2] == {"count_limit"}
