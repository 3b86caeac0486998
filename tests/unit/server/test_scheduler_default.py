"""The default scheduler: which node is chosen, and what is said of those that are not."""

from datetime import UTC, datetime

import pytest

from hvtest_control_plane import fake_driver
from hypervisor.core.model import DriverInfo, LabelConstraint, Node
from hypervisor.core.resources import GIB, MIB, ZERO, Resources
from hypervisor.core.states import InstanceType, NodeStatus, PlacementPolicy
from hypervisor.server.scheduler.contract import NodeState, Placement, Refusal, Request, Snapshot
from hypervisor.server.scheduler.default import DefaultScheduler

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
CAPACITY = Resources(cpu_millis=4000, memory_bytes=8 * GIB, disk_bytes=100 * GIB)


def node_state(
    name: str,
    *,
    reserved: Resources = ZERO,
    status: NodeStatus = NodeStatus.READY,
    schedulable: bool = True,
    cordon_reason: str = "",
    labels: dict[str, str] | None = None,
    drivers: tuple[DriverInfo, ...] = (fake_driver(),),
    zone: str = "default",
) -> NodeState:
    node = Node(
        id=f"n-{name}",
        hostname=name,
        address="127.0.0.1",
        port=50052,
        created_at=EPOCH,
        updated_at=EPOCH,
        capacity=CAPACITY,
        status=status,
        schedulable=schedulable,
        cordon_reason=cordon_reason,
        labels=labels or {},
        drivers=drivers,
        zone=zone,
    )
    return NodeState(node, reserved)


def request(
    *,
    cpu_cores: float = 1,
    memory_bytes: int = 64 * MIB,
    disk_bytes: int = 0,
    policy: PlacementPolicy = PlacementPolicy.SPREAD,
    constraints: tuple[LabelConstraint, ...] = (),
    node: str = "",
    seed: str = "",
) -> Request:
    amount = Resources(cpu_millis=round(cpu_cores * 1000), memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    return Request(
        type=InstanceType.CONTAINER,
        resources=amount,
        policy=policy,
        constraints=constraints,
        node=node,
        seed=seed,
    )


def schedule(asked: Request, *states: NodeState) -> Placement | Refusal:
    return DefaultScheduler().schedule(asked, Snapshot({s.node.id: s for s in states}))


def chosen(asked: Request, *states: NodeState) -> str:
    answer = schedule(asked, *states)
    assert isinstance(answer, Placement), answer
    return answer.node_id.removeprefix("n-")


def reason(asked: Request, state: NodeState) -> str:
    answer = schedule(asked, state)
    assert isinstance(answer, Refusal), answer
    return answer.reasons[state.node.hostname]


HALF = Resources(cpu_millis=2000, memory_bytes=4 * GIB)


def test_spread_takes_the_least_reserved_node() -> None:
    assert chosen(request(), node_state("a", reserved=HALF), node_state("b")) == "b"


def test_binpack_takes_the_most_reserved_node_that_fits() -> None:
    full = node_state("c", reserved=CAPACITY)
    asked = request(policy=PlacementPolicy.BINPACK)
    assert chosen(asked, node_state("a", reserved=HALF), node_state("b"), full) == "a"


def test_ties_are_broken_by_the_seed_alone() -> None:
    states = [node_state(name) for name in "abcdefgh"]
    by_seed = {seed: chosen(request(seed=seed), *states) for seed in map(str, range(40))}

    assert by_seed == {seed: chosen(request(seed=seed), *reversed(states)) for seed in by_seed}
    assert len(set(by_seed.values())) > 4, "the choices are spread over equal nodes"


def test_refusals_say_by_how_much_each_resource_is_short() -> None:
    state = node_state("a", reserved=Resources(cpu_millis=1500, memory_bytes=7 * GIB))
    asked = request(cpu_cores=8, memory_bytes=2 * GIB, disk_bytes=200 * GIB)

    assert reason(asked, state) == (
        "needs 8 cores, 2.5 free of 4; needs 2048 MiB of memory, 1024 free of 8192; "
        "needs 200 GiB of disk, 100 free of 100"
    )


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (node_state("a", status=NodeStatus.OFFLINE), "is offline"),
        (node_state("a", schedulable=False, status=NodeStatus.MAINTENANCE), "is cordoned"),
        (node_state("a", schedulable=False, cordon_reason="new disk"), "is cordoned: new disk"),
        (node_state("a", drivers=()), "has no driver for container instances"),
        (
            node_state("a", drivers=(fake_driver(available=False),)),
            "cannot run container instances: it was told not to work",
        ),
        (
            node_state("a", drivers=(fake_driver(lacks={"create": "read-only"}),)),
            "cannot create instances: read-only",
        ),
    ],
)
def test_a_node_that_may_not_run_it_is_refused_with_the_reason(state: NodeState, said: str) -> None:
    assert reason(request(), state) == said


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        (LabelConstraint(key="disk", values=("ssd", "nvme")), True),
        (LabelConstraint(key="disk", values=("hdd",)), False),
        (LabelConstraint(key="gpu", values=("a",)), False),
        (LabelConstraint(key="disk", operator="not_in", values=("ssd",)), False),
        (LabelConstraint(key="gpu", operator="not_in", values=("a",)), True),
        (LabelConstraint(key="disk", operator="exists"), True),
        (LabelConstraint(key="gpu", operator="exists"), False),
        (LabelConstraint(key="hypervisor/hostname", values=("a",)), True),
        (LabelConstraint(key="hypervisor/zone", values=("z1",)), True),
        (LabelConstraint(key="hypervisor/region", values=("elsewhere",)), False),
        (LabelConstraint(key="hypervisor/role", values=("worker",)), True),
    ],
)
def test_label_constraints(constraint: LabelConstraint, fits: bool) -> None:
    state = node_state("a", labels={"disk": "ssd"}, zone="z1")
    answer = schedule(request(constraints=(constraint,)), state)
    assert isinstance(answer, Placement) is fits


def test_a_label_that_differs_is_named_with_what_was_wanted() -> None:
    asked = request(constraints=(LabelConstraint(key="disk", values=("hdd", "tape")),))
    assert reason(asked, node_state("a", labels={"disk": "ssd"})) == "has disk=ssd, wanted: one of hdd, tape"
    assert reason(asked, node_state("a")) == "has no label disk, wanted: one of hdd, tape"


@pytest.mark.parametrize("pin", ["n-b", "b"])
def test_a_pinned_request_goes_to_its_node_or_nowhere(pin: str) -> None:
    assert chosen(request(node=pin), node_state("a"), node_state("b", reserved=HALF)) == "b"
    answer = schedule(request(node=pin), node_state("a"), node_state("b", reserved=CAPACITY))
    assert isinstance(answer, Refusal)
    assert answer.reasons["a"] == f"is not the node asked for ({pin})"
    assert answer.reasons["b"].startswith("needs 1 cores, 0 free of 4")


def test_what_was_judged_before_does_not_change_an_answer() -> None:
    """One scheduler asked again and again answers as a fresh one does, whatever changes in between."""
    scheduler = DefaultScheduler()
    states = {f"n-{name}": node_state(name) for name in "abcd"}
    asked = [
        request(cpu_cores=cpu, policy=policy, node=node, seed=str(round))
        for round in range(6)
        for cpu in (1, 3)
        for policy in PlacementPolicy
        for node in ("", "a")
        for _ in range(2)
    ]
    placed = 0
    for number, one in enumerate(asked):
        answer = scheduler.schedule(one, Snapshot(states))
        assert answer == DefaultScheduler().schedule(one, Snapshot(states))
        if isinstance(answer, Placement) and number % 3:
            placed += 1
            before = states[answer.node_id]
            states[answer.node_id] = NodeState(before.node, before.reserved + one.resources)
        if number == 30:
            del states["n-b"]
        if number == 40:
            states["n-c"] = node_state("c", status=NodeStatus.OFFLINE)
    assert placed > 4
