"""Schedulers by name, built in and installed."""

from importlib.metadata import EntryPoint

import pytest

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.scheduler.options import SchedulerOptions
from hypervisor.server.scheduler.registry import (
    ENTRY_POINT_GROUP,
    FILTER_GROUP,
    SCORE_GROUP,
    load_scheduler,
)


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


def plugin(name: str, value: str, group: str) -> EntryPoint:
    return EntryPoint(name, value, group)


_PLUGINS = "hypervisor.server.scheduler.plugins"


def test_plug_ins_are_used_where_they_are_named() -> None:
    found = (
        plugin("again", f"{_PLUGINS}:ResourcesFit", FILTER_GROUP),
        plugin("busy", f"{_PLUGINS}:Load", SCORE_GROUP),
        plugin("not-asked", "no_such_module:thing", SCORE_GROUP),
    )
    made = load_scheduler("default", SchedulerOptions(plugins=("again", "busy")), found=found)

    assert isinstance(made, DefaultScheduler)
    assert [one.name for one in made.judge.extra_filters] == ["resources"]
    assert [(one.name, weight) for one, weight in made.judge.extra_scores] == [("load", 5)]


def test_an_unknown_plug_in_is_answered_with_those_there_are() -> None:
    found = (plugin("busy", f"{_PLUGINS}:Load", SCORE_GROUP),)
    with pytest.raises(InvalidArgument, match="installed are: busy") as refused:
        load_scheduler("default", SchedulerOptions(plugins=("bussy",)), found=found)
    assert refused.value.reason == "SCHEDULER_PLUGIN_UNKNOWN"


@pytest.mark.parametrize("value", ["no_such_module:thing", "collections:OrderedDict"])
def test_a_broken_plug_in_is_named(value: str) -> None:
    found = (plugin("mine", value, FILTER_GROUP),)
    with pytest.raises(InvalidArgument, match="'mine'") as refused:
        load_scheduler("default", SchedulerOptions(plugins=("mine",)), found=found)
    assert refused.value.reason == "SCHEDULER_BROKEN"
