"""Node selectors as typed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.selectors import Condition, Operator, add_selector, parse_selector
from hypervisor.v1.instance_pb2 import Instance, LabelConstraint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zone in (a, b)", [Condition("zone", Operator.IN, ("a", "b"))]),
        ("zone notin (a)", [Condition("zone", Operator.NOT_IN, ("a",))]),
        ("zone not in (a,b)", [Condition("zone", Operator.NOT_IN, ("a", "b"))]),
        ("disk=ssd", [Condition("disk", Operator.IN, ("ssd",))]),
        ("disk == ssd", [Condition("disk", Operator.IN, ("ssd",))]),
        ("disk != ssd", [Condition("disk", Operator.NOT_IN, ("ssd",))]),
        ("gpu", [Condition("gpu", Operator.EXISTS)]),
        (
            "a=1, hypervisor/zone in (x), b",
            [
                Condition("a", Operator.IN, ("1",)),
                Condition("hypervisor/zone", Operator.IN, ("x",)),
                Condition("b", Operator.EXISTS),
            ],
        ),
    ],
)
def test_reads(text, expected):
    assert parse_selector("--selector", text) == tuple(expected)


@pytest.mark.parametrize(
    "text", ["", " ", "a in", "a in ()", "a in (b", "a in (b,)", "a=b,", "a b", "=x", "a=b c"]
)
def test_refuses_and_says_how(text):
    with pytest.raises(InvalidArgument, match="write KEY=VALUE"):
        parse_selector("--selector", text)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_selector("--selector", text)
    except InvalidArgument:
        return
    assert all(condition.key and condition.key in text for condition in found)


def test_becomes_constraints():
    instance = Instance()

    add_selector(instance, parse_selector("s", "a in (x, y), b"))

    assert list(instance.spec.node_selector) == [
        LabelConstraint(key="a", operator=LabelConstraint.OPERATOR_IN, values=["x", "y"]),
        LabelConstraint(key="b", operator=LabelConstraint.OPERATOR_EXISTS),
    ]
