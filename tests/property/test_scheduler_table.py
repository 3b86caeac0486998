"""The default scheduler, which chooses on the table, against its rules applied node by node: always the same answer.

Random clusters, requests with everything a spec can ask for, and histories in which placements are made, taken back,
and nodes come, change and go.
"""

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from hvtest_control_plane import fake_driver
from hypervisor.core.model import AffinityTerm, LabelConstraint, Node, SpreadTerm, Taint, Toleration
from hypervisor.core.resources import GIB, Resources
from hypervisor.core.states import (
    InstanceType,
    LabelOperator,
    NodeStatus,
    PlacementPolicy,
    TaintEffect,
    TolerationOperator,
)
from hypervisor.server.scheduler.case import Case
from hypervisor.server.scheduler.contract import (
    NodeState,
    PlacedInstance,
    Placement,
    Refusal,
    Request,
    Snapshot,
)
from hypervisor.server.scheduler.default import DefaultScheduler

NOW = datetime(2030, 1, 1, tzinfo=UTC)
KEYS = ("app", "tier")
VALUES = ("a", "b")
TOPOLOGIES = ("hypervisor/hostname", "hypervisor/zone", "rack")
IMAGES = ("one", "two")

labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2)
amounts = st.builds(
    Resources,
    cpu_millis=st.integers(0, 8_000),
    memory_bytes=st.integers(0, 8).map(lambda n: n * GIB),
    disk_bytes=st.integers(0, 3).map(lambda n: n * GIB),
)
small = st.builds(
    Resources, cpu_millis=st.integers(0, 2_000), memory_bytes=st.integers(0, 2).map(lambda n: n * GIB)
)
conditions = st.builds(
    LabelConstraint,
    key=st.sampled_from(KEYS),
    operator=st.sampled_from(
        [LabelOperator.IN, LabelOperator.IN, LabelOperator.NOT_IN, LabelOperator.EXISTS]
    ),
    values=st.sampled_from([("a",), ("b",), ("a", "b")]),
)
selectors = st.lists(conditions, min_size=1, max_size=2).map(tuple)
terms = st.builds(
    AffinityTerm,
    selector=selectors,
    topology=st.sampled_from(TOPOLOGIES),
    preferred=st.booleans(),
    weight=st.integers(1, 100),
)
spreads = st.builds(
    SpreadTerm, selector=selectors, topology=st.sampled_from(TOPOLOGIES), weight=st.integers(1, 100)
)
taints = st.builds(
    Taint, key=st.sampled_from(KEYS), value=st.sampled_from(("", "a")), effect=st.sampled_from(TaintEffect)
)
tolerations = st.one_of(
    st.builds(
        Toleration,
        key=st.sampled_from(KEYS),
        value=st.sampled_from(("", "a")),
        effect=st.sampled_from([None, *TaintEffect]),
    ),
    st.builds(
        Toleration,
        key=st.sampled_from(("", *KEYS)),
        operator=st.just(TolerationOperator.EXISTS),
        effect=st.sampled_from([None, *TaintEffect]),
    ),
)


def few(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.one_of(st.just(()), st.lists(strategy, max_size=2).map(tuple))


requests = st.builds(
    Request,
    type=st.sampled_from([InstanceType.CONTAINER, InstanceType.CONTAINER, InstanceType.VM]),
    resources=small,
    policy=st.sampled_from(PlacementPolicy),
    constraints=few(
        st.builds(
            LabelConstraint,
            key=st.sampled_from(["rack", "hypervisor/zone"]),
            operator=st.sampled_from(LabelOperator),
            values=st.sampled_from([("a",), ("b",)]),
        )
    ),
    node=st.sampled_from(["", "", "", "", "n-1", "host-2", "nowhere"]),
    seed=st.text(max_size=2),
    labels=labels,
    image=st.sampled_from(("", *IMAGES)),
    tolerations=few(tolerations),
    affinity=few(terms),
    anti_affinity=few(terms),
    spread=few(spreads),
)


@st.composite
def states(draw: st.DrawFn, number: int) -> NodeState:
    node = Node(
        id=f"n-{number}",
        hostname=f"host-{draw(st.sampled_from([number, number, number, 2]))}",
        address="127.0.0.1",
        port=1,
        created_at=NOW,
        updated_at=NOW,
        zone=draw(st.sampled_from(VALUES)),
        capacity=draw(amounts),
        status=draw(st.sampled_from([*[NodeStatus.READY] * 4, NodeStatus.OFFLINE, NodeStatus.MAINTENANCE])),
        schedulable=draw(st.integers(0, 5)) > 0,
        labels=draw(st.dictionaries(st.just("rack"), st.sampled_from(VALUES))),
        drivers=draw(
            st.sampled_from([(fake_driver(),), (fake_driver(),), (), (fake_driver(InstanceType.CONTAINER),)])
        ),
        own_taints=draw(few(taints)),
    )
    return NodeState(
        node,
        reserved=draw(st.one_of(st.just(Resources()), small)),
        allocatable=draw(st.one_of(st.none(), amounts)),
        load=draw(st.sampled_from([-1, 0, 400, 1000])),
        penalty=draw(st.sampled_from([0, 0, 250, 1000])),
        images=draw(st.sampled_from([frozenset(), frozenset({"one"}), frozenset(IMAGES)])),
    )


def instance(draw: st.DrawFn) -> PlacedInstance:
    return PlacedInstance(
        node_id=f"n-{draw(st.integers(0, 5))}",
        project=draw(st.sampled_from(["default", "default", "other"])),
        labels=draw(labels),
        refuses=tuple(replace_preferred(t) for t in draw(few(terms))),
    )


def replace_preferred(term: object) -> AffinityTerm:
    assert isinstance(term, AffinityTerm)
    return AffinityTerm(selector=term.selector, topology=term.topology)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_the_table_chooses_as_the_rules_do_whatever_happened_before(data: st.DataObject) -> None:
    nodes = {f"n-{n}": data.draw(states(n)) for n in range(data.draw(st.integers(0, 5)))}
    instances = {f"i-{n}": instance(data.draw) for n in range(data.draw(st.integers(0, 6)))}
    scheduler = DefaultScheduler()
    placed = 0
    # The same few requests again and again: what was made for them before has to have kept up.
    pool = data.draw(st.lists(requests, min_size=1, max_size=2))
    for _ in range(data.draw(st.integers(1, 8))):
        request = data.draw(st.sampled_from(pool))
        snapshot = Snapshot(dict(nodes), dict(instances))

        answer = scheduler.schedule(request, snapshot)

        expected = scheduler.judge.schedule(request, snapshot)
        assert answer == expected
        if isinstance(answer, Refusal):
            assert set(answer.reasons) == {s.node.hostname for s in nodes.values()}
            assert all(answer.reasons.values())
        else:
            parts = scheduler.parts(request, snapshot, answer.node_id)
            assert parts == tuple(
                p for p in scheduler.judge.parts(Case(request, snapshot), nodes[answer.node_id]) if p.weight
            )
            assert sum(p.value * p.weight for p in parts) == answer.score
        match data.draw(st.sampled_from(["place", "place", "take back", "node", "gone", "count"])):
            case "place" if isinstance(answer, Placement):
                state = nodes[answer.node_id]
                nodes[answer.node_id] = state.with_more(request.resources, 1)
                instances[f"p-{placed}"] = PlacedInstance(
                    answer.node_id,
                    request.project,
                    request.labels,
                    tuple(t for t in request.anti_affinity if not t.preferred),
                )
                placed += 1
            case "take back" if instances:
                del instances[data.draw(st.sampled_from(sorted(instances)))]
            case "node":
                number = data.draw(st.integers(0, 5))
                nodes[f"n-{number}"] = data.draw(states(number))
            case "gone" if nodes:
                del nodes[data.draw(st.sampled_from(sorted(nodes)))]
            case "count":
                check_capacity(scheduler, request, Snapshot(dict(nodes), dict(instances)))


def check_capacity(scheduler: DefaultScheduler, request: Request, snapshot: Snapshot) -> None:
    """What is said to fit does fit, one after another; and where nothing ends the count, no more does."""
    request = replace(
        request, resources=request.resources + Resources(cpu_millis=700), seed="", node=request.node
    )
    found = scheduler.capacity(request, snapshot, limit=50)

    assert scheduler.schedule(request, snapshot) == scheduler.judge.schedule(request, snapshot)
    total = sum(found.counts.values())
    fits = isinstance(scheduler.judge.schedule(request, snapshot), Placement)
    assert (total > 0) == fits
    for node_id, count in found.counts.items():
        state = found.after.nodes[node_id]
        assert state.instances - snapshot.nodes[node_id].instances == count
        assert state.reserved.fits_in(state.total)
    if total < 50:
        assert isinstance(scheduler.judge.schedule(request, found.after), Refusal)
