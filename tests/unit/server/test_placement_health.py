"""How failures and successes make a node's penalty, and how time undoes it."""

from datetime import UTC, datetime, timedelta

from hypervisor.core.model import ErrorRecord, NodeResources, OperationRecord
from hypervisor.core.states import OperationState
from hypervisor.server.node_facts import ServerFacts, load_of
from hypervisor.server.placement_health import PlacementHealth
from hypervisor.server.services import ClusterChange, Kind, Versioned

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)


class SetClock:
    """Stands where it is put."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self.passed_s)

    def monotonic(self) -> float:
        return self.passed_s

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here sleeps")


def ended(number: int, at_s: float, *, kind: str = "Internal", verb: str = "create") -> ClusterChange:
    """A create on n-1 that ended; ``kind`` empty: well."""
    operation = OperationRecord(
        id=f"op-{number}",
        verb=verb,
        object_kind="instance",
        object_id=f"i-{number}",
        object_name="web",
        principal="alice",
        started_at=BEGIN,
        state=OperationState.FAILED if kind else OperationState.SUCCEEDED,
        error=ErrorRecord(kind=kind, reason="X", message=f"failure {number}") if kind else None,
        finished_at=BEGIN + timedelta(seconds=at_s),
        node_id="n-1",
    )
    return ClusterChange(Kind.OPERATION, operation.id, 1, Versioned(operation, 1), None, True)


def health(clock: SetClock) -> tuple[PlacementHealth, list[str]]:
    changed: list[str] = []
    return PlacementHealth(clock, half_life_s=600.0, changed=changed.append), changed


def test_failures_add_up_and_fade() -> None:
    clock = SetClock()
    found, changed = health(clock)
    for number in range(6):
        found.learn([ended(number, 0.0)])
    assert found.penalty("n-1") == 1000
    known = found.of("n-1")
    assert known is not None
    assert (known.failures, known.last_failure) == (6, "failure 5")

    clock.passed_s = 600.0
    found.refresh()
    assert found.penalty("n-1") == 500
    clock.passed_s = 1200.0
    found.refresh()
    assert found.penalty("n-1") == 250

    changed.clear()
    clock.passed_s = 600.0 * 20
    found.refresh()
    assert (found.penalty("n-1"), found.of("n-1"), changed) == (0, None, ["n-1"])


def test_a_success_halves_it() -> None:
    found, _ = health(SetClock())
    found.learn([ended(1, 0.0), ended(2, 0.0), ended(3, 0.0, kind="")])

    known = found.of("n-1")
    assert known is not None
    assert (known.penalty, known.failures) == (250, 0)


def test_what_is_the_requests_fault_does_not_count() -> None:
    found, changed = health(SetClock())
    found.learn(
        [
            ended(1, 0.0, kind="InvalidArgument"),
            ended(2, 0.0, kind="NotFound"),
            ended(3, 0.0, verb="start"),
            ended(4, 0.0, kind=""),
        ]
    )
    assert (found.of("n-1"), changed) == (None, [])


def test_history_counts_in_the_order_in_which_it_happened() -> None:
    clock = SetClock()
    clock.passed_s = 600.0
    in_order, _ = health(clock)
    shuffled, _ = health(clock)
    events = [ended(1, 0.0), ended(2, 10.0, kind=""), ended(3, 500.0), ended(4, 600.0)]

    in_order.learn(events)
    shuffled.learn([events[2], events[0], events[3], events[1]])

    assert in_order.of("n-1") == shuffled.of("n-1")
    assert in_order.penalty("n-1") == int(125 * 2 ** (-590 / 600) + 250 * 2 ** (-100 / 600) + 250)


def test_an_end_is_counted_once() -> None:
    found, _ = health(SetClock())
    change = ended(1, 0.0)
    found.learn([change])
    found.learn([ClusterChange(Kind.OPERATION, "op-1", 2, change.current, change.current, True)])
    assert found.penalty("n-1") == 250


def test_a_node_that_left_is_forgotten() -> None:
    found, _ = health(SetClock())
    found.learn([ended(1, 0.0)])
    found.learn([ClusterChange(Kind.NODE, "n-1", 2, None, None, True)])
    assert found.penalty("n-1") == 0


def test_measured_use_is_told_in_steps_and_not_for_ever() -> None:
    clock = SetClock()
    changed: list[str] = []
    facts = ServerFacts(clock, PlacementHealth(clock, half_life_s=600.0), use_valid_s=30.0)
    facts.listen(changed.append)

    def used(cpu: int) -> NodeResources:
        return NodeResources(cpu_millis=4000, cpu_used_millis=cpu, memory_bytes=100, memory_used_bytes=20)

    assert facts.load("n-1") == -1
    facts.heard("n-1", used(2000))
    facts.heard("n-1", used(2010))
    assert (facts.load("n-1"), changed) == (350, ["n-1"])
    facts.heard("n-1", used(4000))
    assert (facts.load("n-1"), changed) == (600, ["n-1"] * 2)

    clock.passed_s = 31.0
    facts.refresh()
    assert (facts.load("n-1"), changed) == (-1, ["n-1"] * 3)


def test_load_of_a_node_that_measures_nothing_is_not_known() -> None:
    assert load_of(NodeResources()) == -1
    assert load_of(NodeResources(cpu_millis=1000, cpu_used_millis=5000)) == 1000


def test_images_of_a_node_are_those_of_its_newest_heartbeat_by_name() -> None:
    clock = SetClock()
    changed: list[str] = []
    names = {"aa": ("debian-12", "debian"), "bb": ("linux",)}
    facts = ServerFacts(
        clock,
        PlacementHealth(clock, half_life_s=600.0),
        use_valid_s=30.0,
        names_of=lambda digest: names.get(digest, ()),
    )
    facts.listen(changed.append)

    facts.heard("n-1", NodeResources(), digests=["aa", "no longer an image"])
    assert facts.images("n-1") == {"image:debian-12", "image:debian"}
    facts.heard("n-1", NodeResources(), digests=["aa"])
    assert changed == ["n-1"]
    facts.heard("n-1", NodeResources(), digests=["bb"])
    assert facts.images("n-1") == {"image:linux"}
    assert changed == ["n-1"] * 2

    clock.passed_s = 31.0
    facts.refresh()
    assert facts.images("n-1") == frozenset()
