"""Schedulers by name, built in and installed."""

from importlib.metadata import EntryPoint

import pytest

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.scheduler.registry import ENTRY_POINT_GROUP, load_scheduler


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


def test_the_default_is_built_in() -> None:
    assert load_scheduler("default").name == "default"


def test_an_entry_point_adds_one() -> None:
    installed = (entry("mine", "hypervisor.server.scheduler.default:DefaultScheduler"),)
    assert load_scheduler("mine", found=installed).name == "default"


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(InvalidArgument, match="default, mine") as refused:
        load_scheduler("other", found=(entry("mine", "x:y"),))
    assert refused.value.reason == "SCHEDULER_UNKNOWN"


@pytest.mark.parametrize("value", ["no_such_module:thing", "json:loads", "collections:OrderedDict"])
def test_a_broken_one_is_named(value: str) -> None:
    with pytest.raises(InvalidArgument, match="mine") as refused:
        load_scheduler("mine", found=(entry("mine", value),))
    assert refused.value.reason == "SCHEDULER_BROKEN"
