"""Taints as text, there and back."""

import pytest

from hypervisor.core.model import Taint
from hypervisor.core.states import TaintEffect
from hypervisor.core.taints import parse_taint


@pytest.mark.parametrize("text", ["gpu:no_schedule", "example.com/gpu=a-100:prefer_no_schedule"])
def test_a_taint_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_taint(text)) == text


def test_what_the_parts_are() -> None:
    assert parse_taint(" gpu=yes:no_schedule ") == Taint(
        key="gpu", value="yes", effect=TaintEffect.NO_SCHEDULE
    )


@pytest.mark.parametrize("text", ["", "gpu", "gpu:", "gpu:never", ":no_schedule", "=x:no_schedule"])
def test_the_form_is_told_where_it_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match="write KEY:EFFECT or KEY=VALUE:EFFECT"):
        parse_taint(text)


@pytest.mark.parametrize("text", ["-gpu:no_schedule", "gpu=a b:no_schedule"])
def test_keys_and_values_are_those_of_labels(text: str) -> None:
    with pytest.raises(ValueError, match="is not legal"):
        parse_taint(text)
