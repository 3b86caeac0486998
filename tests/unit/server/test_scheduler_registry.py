"""Schedulers by name, built in and installed."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.scheduler.options import SchedulerOptions
from hypervisor.server.scheduler.plugins import Load, ResourcesFit
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


class OddNodes(ResourcesFit):
    """A filter of somebody's."""

    name = "odd"


class Quiet(Load):
    """A score of somebody's."""

    name = "quiet"


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that entry points can name."""
    module = ModuleType("plugged")
    vars(module).update(OddNodes=OddNodes, Quiet=Quiet, Load=Load, ResourcesFit=ResourcesFit)
    monkeypatch.setitem(sys.modules, "plugged", module)
    return "plugged"


def test_plug_ins_are_used_where_they_are_named(plugged: str) -> None:
    found = (
        plugin("odd-ones", f"{plugged}:OddNodes", FILTER_GROUP),
        plugin("calm", f"{plugged}:Quiet", SCORE_GROUP),
        plugin("not-asked", "no_such_module:thing", SCORE_GROUP),
        plugin("not-asked-either", f"{plugged}:Load", SCORE_GROUP),
    )
    made = load_scheduler("default", SchedulerOptions(plugins=("odd-ones", "calm")), found=found)

    assert isinstance(made, DefaultScheduler)
    assert [one.name for one in made.judge.extra_filters] == ["odd"]
    assert [(one.name, weight) for one, weight in made.judge.extra_scores] == [("quiet", 100)]


@pytest.mark.parametrize(
    ("value", "group", "name"), [("Load", SCORE_GROUP, "load"), ("ResourcesFit", FILTER_GROUP, "resources")]
)
def test_a_plug_in_with_the_name_of_a_built_in_one_is_refused(
    plugged: str, value: str, group: str, name: str
) -> None:
    found = (plugin("mine", f"{plugged}:{value}", group),)
    with pytest.raises(
        InvalidArgument, match=f"'mine' calls itself '{name}'.*the built-in '{name}'"
    ) as refused:
        load_scheduler("default", SchedulerOptions(plugins=("mine",)), found=found)
    assert refused.value.reason == "SCHEDULER_PLUGIN_NAME_TAKEN"


def test_two_plug_ins_of_one_name_are_refused(plugged: str) -> None:
    found = (
        plugin("one", f"{plugged}:Quiet", SCORE_GROUP),
        plugin("two", f"{plugged}:Quiet", SCORE_GROUP),
    )
    with pytest.raises(InvalidArgument, match=r"'two' calls itself 'quiet'.*the plug-in 'one'") as refused:
        load_scheduler("default", SchedulerOptions(plugins=("one", "two")), found=found)
    assert refused.value.reason == "SCHEDULER_PLUGIN_NAME_TAKEN"


def test_two_packages_that_install_one_name_are_refused(plugged: str) -> None:
    found = (
        plugin("mine", f"{plugged}:Quiet", SCORE_GROUP),
        plugin("mine", f"{plugged}:OddNodes", SCORE_GROUP),
    )
    with pytest.raises(InvalidArgument, match="'mine' is installed more than once") as refused:
        load_scheduler("default", SchedulerOptions(plugins=("mine",)), found=found)
    assert refused.value.reason == "SCHEDULER_PLUGIN_NAME_TAKEN"


def test_an_unknown_plug_in_is_answered_with_those_there_are() -> None:
    found = (plugin("busy", "hypervisor.server.scheduler.plugins:Load", SCORE_GROUP),)
    with pytest.raises(InvalidArgument, match="installed are: busy") as refused:
        load_scheduler("default", SchedulerOptions(plugins=("bussy",)), found=found)
    assert refused.value.reason == "SCHEDULER_PLUGIN_UNKNOWN"


@pytest.mark.parametrize("value", ["no_such_module:thing", "collections:OrderedDict"])
def test_a_broken_plug_in_is_named(value: str) -> None:
    found = (plugin("mine", value, FILTER_GROUP),)
    with pytest.raises(InvalidArgument, match="'mine'") as refused:
        load_scheduler("default", SchedulerOptions(plugins=("mine",)), found=found)
    assert refused.value.reason == "SCHEDULER_BROKEN"
