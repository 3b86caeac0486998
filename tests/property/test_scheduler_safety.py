"""The default scheduler's safety: named properties, for any request and any cluster."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from hvtest_control_plane import fake_driver
from hypervisor.core.model import LabelConstraint, Node
from hypervisor.core.resources import GIB, Resources
from hypervisor.core.states import InstanceType, NodeStatus, PlacementPolicy
from hypervisor.server.scheduler.contract import NodeState, Placement, Refusal, Request, Snapshot
from hypervisor.server.scheduler.default import DefaultScheduler

NOW = datetime(2030, 1, 1, tzinfo=UTC)
AMOUNTS = st.builds(
    Resources,
    cpu_millis=st.integers(0, 8_000),
    memory_bytes=st.integers(0, 8).map(lambda n: n * GIB),
    disk_bytes=st.integers(0, 8).map(lambda n: n * GIB),
)
LABELS = st.dictionaries(st.sampled_from(["disk", "gpu"]), st.sampled_from(["a", "b"]))
CONSTRAINTS = st.builds(
    LabelConstraint,
    key=st.sampled_from(["disk", "gpu", "hypervisor/zone"]),
    operator=st.sampled_from(["in", "not_in"]),
    values=st.sampled_from([("a",), ("b",), ("a", "b")]),
)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    states = {}
    for number in range(draw(st.integers(0, 6))):
        node = Node(
            id=f"n-{number}",
            hostname=f"host-{number}",
            address="127.0.0.1",
            port=1,
            created_at=NOW,
            updated_at=NOW,
            zone=draw(st.sampled_from(["a", "b"])),
            capacity=draw(AMOUNTS),
            status=draw(st.sampled_from([NodeStatus.READY, NodeStatus.READY, NodeStatus.OFFLINE])),
            schedulable=draw(st.booleans()) or draw(st.booleans()),
            labels=draw(LABELS),
            drivers=draw(st.sampled_from([(), (fake_driver(available=False),), (fake_driver(),)])),
        )
        states[node.id] = NodeState(node, draw(AMOUNTS))
    return Snapshot(states)


REQUESTS = st.builds(
    Request,
    type=st.just(InstanceType.CONTAINER),
    resources=AMOUNTS,
    policy=st.sampled_from(PlacementPolicy),
    constraints=st.lists(CONSTRAINTS, max_size=2).map(tuple),
    node=st.sampled_from(["", "", "n-1", "host-2"]),
    seed=st.text(max_size=3),
)


def may_run(request: Request, state: NodeState) -> bool:
    """The rules, written down a second time and differently."""
    node, labels = state.node, {**state.node.labels, "hypervisor/zone": state.node.zone}
    return all(
        [
            node.status is NodeStatus.READY,
            node.schedulable,
            any(d.available and request.type in d.types for d in node.drivers),
            request.node in ("", node.id, node.hostname),
            (request.resources + state.reserved).fits_in(node.capacity),
            *((labels.get(c.key) in c.values) is (c.operator == "in") for c in request.constraints),
        ]
    )


@given(REQUESTS, snapshots())
def test_it_chooses_only_nodes_that_may_run_it_and_refuses_only_when_there_is_none(
    request: Request, snapshot: Snapshot
) -> None:
    able = {node_id for node_id, state in snapshot.nodes.items() if may_run(request, state)}

    match DefaultScheduler().schedule(request, snapshot):
        case Placement(node_id=node_id):
            assert node_id in able
        case Refusal(reasons=reasons):
            assert able == set()
            assert set(reasons) == {state.node.hostname for state in snapshot.nodes.values()}
            assert all(reasons.values())


@given(REQUESTS, snapshots())
def test_it_is_a_function_of_its_arguments(request: Request, snapshot: Snapshot) -> None:
    mirrored = Snapshot(dict(reversed(list(snapshot.nodes.items()))))

    assert DefaultScheduler().schedule(request, snapshot) == DefaultScheduler().schedule(request, mirrored)


@given(REQUESTS, snapshots())
def test_spread_and_binpack_are_opposites(request: Request, snapshot: Snapshot) -> None:
    def share(policy: PlacementPolicy) -> float | None:
        asked = Request(
            type=request.type,
            resources=request.resources,
            policy=policy,
            constraints=request.constraints,
            node=request.node,
        )
        answer = DefaultScheduler().schedule(asked, snapshot)
        return answer.score if isinstance(answer, Placement) else None

    spread, binpack = share(PlacementPolicy.SPREAD), share(PlacementPolicy.BINPACK)
    if spread is None or binpack is None:
        assert spread is binpack
    else:
        assert 100.0 - spread <= binpack + 1e-6, "binpack's node is at least as full as spread's"
