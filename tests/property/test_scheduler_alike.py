"""Nodes found by what they have in common are those that the filters pass one by one, whatever came, changed, went."""

import random
from datetime import UTC, datetime

import pytest

from hypervisor.core.model import LabelConstraint, Node, Taint, Toleration
from hypervisor.core.states import LabelOperator, NodeRole, TaintEffect, TolerationOperator
from hypervisor.server.scheduler import alike as module
from hypervisor.server.scheduler.alike import Alike
from hypervisor.server.scheduler.columns import Static
from hypervisor.server.scheduler.contract import BUILT_IN_LABELS, NodeState

NOW = datetime(2030, 1, 1, tzinfo=UTC)
KEYS = ("disk", "rack", "serial", *BUILT_IN_LABELS)


def some_node(rng: random.Random, number: int) -> NodeState:
    """Ids and host names overlap: a node may be called as another one is."""
    labels = {"serial": f"s{number}"} if rng.random() < 0.8 else {}
    labels |= {key: rng.choice("abc") for key in ("disk", "rack") if rng.random() < 0.7}
    taints = tuple(
        Taint(
            key=rng.choice(["gpu", "old"]),
            value=rng.choice(["", "yes"]),
            effect=rng.choice(list(TaintEffect)),
        )
        for _ in range(rng.choice([0, 0, 1, 2]))
    )
    return NodeState(
        Node(
            id=f"n{number}",
            hostname=rng.choice([f"h{number}", f"h{number}", f"n{number + 1}", "h0"]),
            address="a",
            port=1,
            created_at=NOW,
            updated_at=NOW,
            zone=rng.choice(["z1", "z2"]),
            role=rng.choice(list(NodeRole)),
            labels=labels,
            own_taints=taints[:1],
            set_taints=taints[1:],
        )
    )


def some_look(rng: random.Random) -> Static:
    values = ("a", "b", "c", "z1", "z2", "s1", "s2", "n3", "h0", "worker", "nowhere")
    return Static(
        rng.choice(["", "", "", "n3", "h0", "h5", "nowhere"]),
        tuple(
            LabelConstraint(
                key=rng.choice([*KEYS, "absent"]),
                operator=rng.choice(list(LabelOperator)),
                values=tuple(rng.sample(values, rng.randrange(1, 5))),
            )
            for _ in range(rng.randrange(3))
        ),
        tuple(
            Toleration(
                key=rng.choice(["", "gpu", "old"]),
                operator=rng.choice(list(TolerationOperator)),
                value=rng.choice(["", "yes"]),
                effect=rng.choice([None, *TaintEffect]),
            )
            for _ in range(rng.randrange(3))
        ),
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kept", [2, 64])
def test_nodes_found_together_are_those_that_pass_one_by_one(
    monkeypatch: pytest.MonkeyPatch, seed: int, kept: int
) -> None:
    monkeypatch.setattr(module, "_LABELS_KEPT", kept)
    rng = random.Random(seed)
    slots: dict[str, int] = {}
    states: dict[str, NodeState] = {}
    alike = Alike(slots)
    passed = failed = 0

    for _ in range(400):
        number = rng.randrange(40)
        old, new = states.get(f"n{number}"), some_node(rng, number)
        slot = slots.setdefault(f"n{number}", number)
        if old is not None and rng.random() < 0.3:
            alike.change(slot, old, None)
            del slots[f"n{number}"], states[f"n{number}"]
        else:
            alike.change(slot, old, new)
            states[f"n{number}"] = new
        look = some_look(rng)

        eligible = {slots[i] for i, state in states.items() if look.eligible(state)}
        assert alike.eligible(look) == eligible
        rated = {slot: mildness for mildness, some in alike.mildness(look) for slot in some}
        assert rated == {slots[i]: look.mildness(state) for i, state in states.items()}
        if look.node:
            named = {slots[i] for i, s in states.items() if look.node in (i, s.node.hostname)}
            assert alike.named(look.node) == named
        passed += len(eligible)
        failed += len(states) - len(eligible)

    assert min(passed, failed) > 400


class Counting(Static):
    """Counts the judgements of single nodes."""

    asked = 0

    def tolerates(self, state: NodeState) -> bool:
        Counting.asked += 1
        return super().tolerates(state)

    def eligible(self, state: NodeState) -> bool:
        raise AssertionError("no node is judged by itself")


def test_each_set_of_taints_is_judged_once_and_no_node_by_itself() -> None:
    slots = {f"n{number}": number for number in range(1000)}
    alike = Alike(slots)
    gpu = Taint(key="gpu", effect=TaintEffect.NO_SCHEDULE)
    for node_id, number in slots.items():
        node = Node(
            id=node_id,
            hostname=node_id,
            address="a",
            port=1,
            created_at=NOW,
            updated_at=NOW,
            labels={"rack": str(number % 10)},
            set_taints=(gpu,) if number % 2 else (),
        )
        alike.change(number, None, NodeState(node))
    constraint = LabelConstraint(key="rack", operator=LabelOperator.IN, values=("1", "2"))

    found = alike.eligible(Counting("", (constraint,), ()))

    assert found == {number for number in range(1000) if number % 10 == 2}
    assert Counting.asked == 2
