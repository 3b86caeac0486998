"""Each filter and each score by itself: what it says, in which words, with which numbers."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from msgspec import structs

from hvtest_control_plane import fake_driver
from hypervisor.core.model import (
    AffinityTerm,
    LabelConstraint,
    Node,
    SpreadTerm,
    Taint,
    Toleration,
)
from hypervisor.core.resources import GIB, ZERO, Resources
from hypervisor.core.states import (
    InstanceType,
    LabelOperator,
    NodeStatus,
    PlacementPolicy,
    TaintEffect,
    TolerationOperator,
)
from hypervisor.server.scheduler.case import Case
from hypervisor.server.scheduler.contract import NodeState, PlacedInstance, Request, Snapshot
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.scheduler.judge import Judge
from hypervisor.server.scheduler.plugins import (
    Affinity,
    AwayFromOthers,
    ImagePresent,
    Load,
    NearOthers,
    Penalty,
    Ready,
    ResourcesFit,
    Schedulable,
    SpreadOverPlaces,
    Taints,
    TaintsTolerated,
    Utilisation,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
WEB = (LabelConstraint(key="app", values=("web",)),)
ZONE = "hypervisor/zone"
ASKED = Request(
    InstanceType.CONTAINER,
    Resources(cpu_millis=1000, memory_bytes=2 * GIB),
    PlacementPolicy.SPREAD,
)


def state(
    name: str = "a", *, zone: str = "z", labels: Mapping[str, str] | None = None, **changes: object
) -> NodeState:
    node = Node(
        id=f"n-{name}",
        hostname=name,
        address="127.0.0.1",
        port=1,
        created_at=NOW,
        updated_at=NOW,
        zone=zone,
        capacity=Resources(cpu_millis=4000, memory_bytes=16 * GIB, disk_bytes=10 * GIB),
        labels=dict(labels or {}),
        drivers=(fake_driver(),),
    )
    return replace(NodeState(node), **changes)  # type: ignore[arg-type]


def tainted(*taints: Taint) -> NodeState:
    plain = state()
    return replace(plain, node=structs.replace(plain.node, own_taints=taints))


def case(request: Request, *states: NodeState, placed: tuple[PlacedInstance, ...] = ()) -> Case:
    return Case(
        request, Snapshot({s.node.id: s for s in states}, {f"i-{n}": p for n, p in enumerate(placed)})
    )


def on(
    name: str, app: str = "web", *, project: str = "default", refuses: tuple[AffinityTerm, ...] = ()
) -> PlacedInstance:
    return PlacedInstance(f"n-{name}", project, {"app": app}, refuses)


def test_offline_and_cordoned_are_two_things() -> None:
    offline = replace(state(), node=structs.replace(state().node, status=NodeStatus.OFFLINE))
    cordoned = replace(
        state(),
        node=structs.replace(
            state().node, status=NodeStatus.MAINTENANCE, schedulable=False, cordon_reason="disk"
        ),
    )
    both = case(ASKED, offline, cordoned)

    assert [Ready().reason_against(both, s) for s in (offline, cordoned)] == ["is offline", None]
    assert [Schedulable().reason_against(both, s) for s in (offline, cordoned)] == [None, "is cordoned: disk"]


def test_resources_are_judged_by_what_may_be_reserved() -> None:
    tight = state(
        allocatable=Resources(cpu_millis=1500, memory_bytes=16 * GIB), reserved=Resources(cpu_millis=600)
    )

    assert ResourcesFit().reason_against(case(ASKED), tight) == "needs 1 cores, 0.9 free of 1.5"
    assert ResourcesFit().reason_against(case(ASKED), state()) is None


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        (Toleration(key="gpu", value="yes"), True),
        (Toleration(key="gpu", value="no"), False),
        (Toleration(key="gpu"), False),
        (Toleration(key="gpu", operator=TolerationOperator.EXISTS), True),
        (Toleration(operator=TolerationOperator.EXISTS), True),
        (Toleration(key="cpu", operator=TolerationOperator.EXISTS), False),
        (Toleration(key="gpu", value="yes", effect=TaintEffect.PREFER_NO_SCHEDULE), False),
        (Toleration(key="gpu", value="yes", effect=TaintEffect.NO_SCHEDULE), True),
    ],
)
def test_a_taint_is_tolerated_by_key_value_and_effect(toleration: Toleration, tolerated: bool) -> None:
    node = tainted(Taint(key="gpu", value="yes", effect=TaintEffect.NO_SCHEDULE))
    asked = replace(ASKED, tolerations=(toleration,))

    reason = TaintsTolerated().reason_against(case(asked, node), node)

    assert (reason is None) is tolerated
    assert reason in (None, "has the taint gpu=yes:no_schedule, which is not tolerated")


def test_mild_taints_are_no_filter_but_a_score() -> None:
    node = tainted(Taint(key="old", effect=TaintEffect.PREFER_NO_SCHEDULE))
    tolerant = replace(ASKED, tolerations=(Toleration(key="old"),))

    assert TaintsTolerated().reason_against(case(ASKED, node), node) is None
    assert [Taints().score(case(asked, node), node) for asked in (ASKED, tolerant)] == [0, 1000]


def test_affinity_wants_a_match_in_the_same_place_of_the_same_project() -> None:
    nodes = (state("a", zone="x"), state("b", zone="x"), state("c", zone="y"), state("d", zone="w"))
    asked = replace(ASKED, affinity=(AffinityTerm(selector=WEB, topology=ZONE),))
    judged = case(asked, *nodes, placed=(on("a"), on("c", "db"), on("d", project="other")))

    reasons = [NearOthers().reason_against(judged, node) for node in nodes]

    missing = "has no instance with app in (web) in the same hypervisor/zone"
    assert reasons == [None, None, f"{missing} (y)", f"{missing} (w)"]


def test_affinity_to_itself_is_waived_for_the_first_alone() -> None:
    node, other = state("a"), state("b")
    asked = replace(ASKED, labels={"app": "web"}, affinity=(AffinityTerm(selector=WEB),))

    assert NearOthers().reason_against(case(asked, node, other), node) is None
    second = case(asked, node, other, placed=(on("b"),))
    assert [NearOthers().reason_against(second, s) is None for s in (node, other)] == [False, True]


def test_a_node_without_the_label_is_in_no_place() -> None:
    node, racked = state("a"), state("b", labels={"rack": "1"})
    near = replace(ASKED, affinity=(AffinityTerm(selector=WEB, topology="rack"),))
    away = replace(ASKED, anti_affinity=(AffinityTerm(selector=WEB, topology="rack"),))
    placed = (on("a"), on("b"))

    assert NearOthers().reason_against(case(near, node, racked, placed=placed), node) == (
        "has no label rack, which affinity asks for"
    )
    judged = case(away, node, racked, placed=placed)
    assert AwayFromOthers().reason_against(judged, node) is None
    assert AwayFromOthers().reason_against(judged, racked) == (
        "has an instance with app in (web) in the same rack (1)"
    )


def test_those_that_are_there_may_refuse_the_newcomer() -> None:
    term = AffinityTerm(selector=(LabelConstraint(key="tier", operator=LabelOperator.EXISTS),), topology=ZONE)
    nodes = (state("a", zone="x"), state("b", zone="y"))
    meant = replace(ASKED, labels={"tier": "1"})
    placed = (on("a", refuses=(term,)), on("a", refuses=(term,)))

    assert AwayFromOthers().reason_against(case(meant, *nodes, placed=placed), nodes[0]) == (
        "has 2 instances that must not be with tier in the same hypervisor/zone (x)"
    )
    assert AwayFromOthers().reason_against(case(meant, *nodes, placed=placed), nodes[1]) is None
    assert AwayFromOthers().reason_against(case(ASKED, *nodes, placed=placed), nodes[0]) is None


@pytest.mark.parametrize(
    ("reserved", "spread", "binpack"),
    [
        (ZERO, 812, 187),  # (1/4 + 2/16) / 2
        (Resources(cpu_millis=2000, memory_bytes=4 * GIB), 437, 562),
        (Resources(cpu_millis=3000, memory_bytes=14 * GIB), 0, 1000),
    ],
)
def test_utilisation_is_the_mean_share_after_the_placement(
    reserved: Resources, spread: int, binpack: int
) -> None:
    node = state(reserved=reserved)
    packed = replace(ASKED, policy=PlacementPolicy.BINPACK)

    # Rounded down by the reciprocals that the table keeps.
    assert 0 <= binpack - Utilisation().score(case(packed), node) <= 1
    assert 0 <= Utilisation().score(case(ASKED), node) - spread <= 1


def test_spread_counts_per_place_and_weights_each_term() -> None:
    nodes = (state("a", zone="x"), state("b", zone="x"), state("c", zone="y"))
    over = (SpreadTerm(selector=WEB), SpreadTerm(selector=WEB, topology="rack", weight=30))
    judged = case(replace(ASKED, spread=over), *nodes, placed=(on("a"), on("b"), on("b", "db")))

    found = [list(SpreadOverPlaces().values(judged, node)) for node in nodes]

    assert found == [[(333, 100), (0, 30)], [(333, 100), (0, 30)], [(1000, 100), (0, 30)]]


def test_preferences_hold_or_do_not() -> None:
    nodes = (state("a", zone="x"), state("b", zone="y"))
    asked = replace(
        ASKED,
        affinity=(AffinityTerm(selector=WEB, preferred=True, weight=40), AffinityTerm(selector=WEB)),
        anti_affinity=(AffinityTerm(selector=WEB, topology=ZONE, preferred=True),),
    )
    judged = case(asked, *nodes, placed=(on("a"),))

    assert list(Affinity().values(judged, nodes[0])) == [(1000, 40), (0, 100)]
    assert list(Affinity().values(judged, nodes[1])) == [(0, 40), (1000, 100)]


def test_load_image_and_penalty() -> None:
    node = state(load=250, penalty=400, images=frozenset({"busybox"}))
    asked = replace(ASKED, image="busybox")

    assert Load().score(case(ASKED), node) == 750
    assert Load().score(case(ASKED), state()) == 500
    found = [list(ImagePresent().values(case(a), node)) for a in (asked, ASKED, replace(ASKED, image="x"))]
    assert found == [[(1000, 100)], [], [(0, 100)]]
    assert Penalty().score(case(ASKED), node) == 600


def test_weights_of_nought_leave_a_score_out() -> None:
    judge = Judge(weights={"load": 0, "taints": 0})
    names = [part.name for part in judge.parts(case(ASKED, state()), state())]

    assert names == ["utilisation", "penalty"]


class OddNames:
    """A filter of a third party."""

    name = "odd-names"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        self.asked.append(state.node.hostname)
        return None if len(state.node.hostname) % 2 else "has an even name"


class LastLetter:
    """A score of a third party."""

    name = "last-letter"

    def score(self, case: Case, state: NodeState) -> int:
        return ord(state.node.hostname[-1]) - ord("a")


def test_plug_ins_add_filters_and_scores_and_see_only_what_passes() -> None:
    odd = OddNames()
    scheduler = DefaultScheduler(
        weights={"last-letter": 1000}, extra_filters=[odd], extra_scores=[LastLetter()]
    )
    full = state("z", reserved=Resources(cpu_millis=4000))
    nodes = (state("a"), state("bb"), state("c"), state("b"), full)
    snapshot = Snapshot({s.node.id: s for s in nodes})

    answer = scheduler.schedule(ASKED, snapshot)

    assert getattr(answer, "node_id", answer) == "n-c"
    assert sorted(odd.asked) == ["a", "b", "bb", "c"]
    assert answer == scheduler.judge.schedule(ASKED, snapshot)
    refused = scheduler.schedule(ASKED, Snapshot({"n-bb": state("bb")}))
    assert getattr(refused, "reasons", refused) == {"bb": "has an even name"}


def test_more_terms_than_the_table_takes_are_judged_node_by_node() -> None:
    terms = tuple(
        AffinityTerm(selector=(LabelConstraint(key=f"k{n}", values=("v",)),), preferred=True)
        for n in range(8)
    )
    asked = replace(ASKED, affinity=terms, anti_affinity=terms)
    nodes = (state("a"), state("b"))
    snapshot = Snapshot({s.node.id: s for s in nodes}, {"i-0": PlacedInstance("n-b", "default", {"k0": "v"})})
    scheduler = DefaultScheduler()

    answer = scheduler.schedule(asked, snapshot)

    assert answer == scheduler.judge.schedule(asked, snapshot)
    assert sum(scheduler.capacity(asked, snapshot, limit=3).counts.values()) == 3
