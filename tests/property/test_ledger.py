"""The ledger, fed change by change, shows what a ledger would that read everything anew: whatever commits and fails."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.core.errors import Internal
from hypervisor.core.model import Allocation, Instance, InstanceSpec, Node
from hypervisor.core.resources import GIB, ZERO, Resources
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType
from hypervisor.server import keys
from hypervisor.server.cluster_state import Update
from hypervisor.server.drafts import Batch, Draft
from hypervisor.server.keys import RecordKey
from hypervisor.server.ledger import AllocationRules, Ledger
from hypervisor.server.scheduler.contract import Snapshot
from hypervisor.server.services import Versioned

NOW = datetime(2030, 1, 1, tzinfo=UTC)
NODES = ("n-0", "n-1", "n-2")
INSTANCES = ("i-0", "i-1", "i-2", "i-3")
RULES = AllocationRules(overcommit_cpu=2.0, reserve=Resources(memory_bytes=GIB))


class Facts:
    """Facts of nodes that the test changes."""

    def __init__(self) -> None:
        self.loads: dict[str, int] = {}

    def load(self, node_id: str) -> int:
        return self.loads.get(node_id, -1)

    def penalty(self, node_id: str) -> int:
        return 0

    def images(self, node_id: str) -> frozenset[str]:
        return frozenset()

    def refresh(self) -> None:
        pass


class KnownRecords:
    """What a view has seen, and over it what was learned from commits and it has not."""

    def __init__(self) -> None:
        self.revision = 0
        self.seen: dict[str, Versioned[Any] | Internal] = {}
        self.learned: dict[str, Versioned[Any] | None] = {}

    def find(self, key: RecordKey[Any]) -> Versioned[Any] | None:
        if key.path in self.learned:
            return self.learned[key.path]
        found = self.seen.get(key.path)
        if isinstance(found, Internal):
            raise found
        return found

    def mod_revision(self, path: str) -> int:
        return 0

    def ahead(self, path: str) -> bool:
        return False

    def unseen(self) -> Iterable[str]:
        return self.learned.keys()


def node(number: int, label: str) -> Node:
    return Node(
        id=NODES[number],
        hostname=f"host-{label}",
        address="127.0.0.1",
        port=1,
        created_at=NOW,
        updated_at=NOW,
        capacity=Resources(cpu_millis=4000, memory_bytes=8 * GIB),
        labels={label: "x"},
    )


def instance(number: int, node_id: str, status: InstanceStatus, image: str) -> Instance:
    return Instance(
        id=INSTANCES[number],
        name=f"i{number}",
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(image=image),
        status=status,
        desired=DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        node_id=node_id,
    )


records = st.one_of(
    st.builds(
        lambda n, label: (keys.node(NODES[n]), node(n, label)), st.integers(0, 2), st.sampled_from("ab")
    ),
    st.builds(
        lambda n, cpu: (
            keys.allocation(NODES[n]),
            Allocation(node_id=NODES[n], reserved=Resources(cpu_millis=cpu), instances=cpu),
        ),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    st.builds(
        lambda n, where, status, image: (keys.instance(INSTANCES[n]), instance(n, where, status, image)),
        st.integers(0, 3),
        st.sampled_from(("", *NODES)),
        st.sampled_from([InstanceStatus.SCHEDULED, InstanceStatus.RUNNING, InstanceStatus.FAILED]),
        st.sampled_from(["one", "two"]),
    ),
)
gone = st.sampled_from(
    [
        *((keys.node(n), None) for n in NODES),
        *((keys.allocation(n), None) for n in NODES),
        *((keys.instance(i), None) for i in INSTANCES),
    ]
)
writes = st.lists(st.one_of(records, records, gone), min_size=1, max_size=4)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("watch"), writes),
        st.tuples(st.just("learn"), writes),
        st.tuples(st.just("catch up"), st.just([])),
        st.tuples(st.sampled_from(["commit seen", "commit unseen", "fail", "refuse"]), writes),
        st.tuples(st.just("heartbeat"), st.just([])),
        st.tuples(st.just("unreadable"), writes),
    ),
    max_size=12,
)


def anew(draft: Draft, known: KnownRecords, facts: Facts) -> Snapshot:
    """What a ledger shows that reads every record there may be."""
    ledger = Ledger(RULES, facts)
    paths = [
        *(keys.node(n).path for n in NODES),
        *(keys.allocation(n).path for n in NODES),
        *(keys.instance(i).path for i in INSTANCES),
    ]
    ledger.seen([Update(path, Versioned(_ANOTHER, 1)) for path in paths])
    return ledger.sync(draft)


_ANOTHER = node(0, "a")


def seen(known: KnownRecords, ledger: Ledger, changed: list[tuple[RecordKey[Any], Any]]) -> None:
    known.revision += 1
    updates = []
    for key, value in changed:
        record = None if value is None else Versioned(value, known.revision)
        known.learned.pop(key.path, None)
        if record is None:
            known.seen.pop(key.path, None)
        else:
            known.seen[key.path] = record
        updates.append(Update(key.path, record))
    ledger.seen(updates)


def check(ledger: Ledger, known: KnownRecords, facts: Facts, batch: Batch) -> None:
    found, expected = ledger.sync(batch.draft()), anew(batch.draft(), known, facts)

    assert dict(found.nodes) == dict(expected.nodes)
    assert dict(found.instances) == dict(expected.instances)
    assert set(ledger.label_keys) == {key for s in found.nodes.values() for key in s.node.labels}
    for name in ("host-a", "host-b", *NODES):
        assert ledger.knows_node(name) == any(
            name in (node_id, s.node.hostname) for node_id, s in found.nodes.items()
        )


@settings(max_examples=400, deadline=None)
@given(steps)
def test_it_shows_what_is_known_and_nothing_of_what_failed(
    history: list[tuple[str, list[tuple[RecordKey[Any], Any]]]],
) -> None:
    known, facts = KnownRecords(), Facts()
    ledger = Ledger(RULES, facts)
    begin: list[tuple[RecordKey[Any], Any]] = [
        *((keys.node(n), node(number, "a")) for number, n in enumerate(NODES)),
        *((keys.allocation(n), Allocation(node_id=n)) for n in NODES),
        *(
            (keys.instance(i), instance(number, NODES[number % 2], InstanceStatus.RUNNING, "one"))
            for number, i in enumerate(INSTANCES[:3])
        ),
    ]
    for what, changed in [("watch", begin), *history]:
        batch = Batch(known, now=NOW)
        match what:
            case "watch":
                seen(known, ledger, changed)
            case "learn":
                for key, value in changed:
                    known.learned[key.path] = None if value is None else Versioned(value, 1)
            case "catch up":
                # The watch brings what was learned.
                seen(
                    known,
                    ledger,
                    [
                        (RecordKey(path, Node), None if found is None else found.value)
                        for path, found in list(known.learned.items())
                    ],
                )
            case "heartbeat":
                facts.loads["n-1"] = facts.loads.get("n-1", 0) + 100
                ledger.node_changed("n-1")
            case "unreadable":
                for key, _ in changed:
                    known.learned.pop(key.path, None)
                    known.seen[key.path] = Internal("damaged")
                    ledger.seen([Update(key.path, None, error=Internal("damaged"))])
            case _:
                # Each change is a decision of the batch; between them, the next one sees it.
                for key, value in changed:
                    check(ledger, known, facts, batch)
                    draft = batch.draft()
                    ledger.sync(draft)
                    if value is None:
                        draft.delete(key)
                    else:
                        draft.put(key, value)
                    if what != "refuse":
                        assert batch.admit(draft)
                check(ledger, known, facts, batch)
                if what == "commit seen":
                    seen(known, ledger, changed)
                elif what == "commit unseen":
                    for key, value in changed:
                        known.learned[key.path] = None if value is None else Versioned(value, 1)
        check(ledger, known, facts, Batch(known, now=NOW))


def test_what_may_be_reserved_is_what_is_left_after_the_reserve_times_the_ratio() -> None:
    rules = AllocationRules(
        overcommit_cpu=4.0,
        overcommit_memory=1.5,
        reserve=Resources(cpu_millis=500, memory_bytes=GIB, disk_bytes=10 * GIB),
    )

    found = rules.allocatable(Resources(cpu_millis=4000, memory_bytes=9 * GIB + 7, disk_bytes=5 * GIB))

    assert found == Resources(cpu_millis=14_000, memory_bytes=12 * GIB, disk_bytes=0)
    assert AllocationRules().allocatable(ZERO) == ZERO
