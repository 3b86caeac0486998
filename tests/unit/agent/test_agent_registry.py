"""Which drivers a node gets, and what it says of those it lacks."""

import random
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hypervisor.agent.config import ContainerdSection
from hypervisor.agent.config_machines import LibvirtSection, MachinesSection, MicrovmSection
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines
from hypervisor.agent.drivers.registry import (
    DRIVERS,
    ENTRY_POINTS,
    DriverContext,
    DriverFactory,
    Drivers,
    make_drivers,
)
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import Unavailable
from hypervisor.core.ids import new_id
from hypervisor.core.states import InstanceType

CONTEXT = DriverContext(
    clock=SystemClock(),
    rng=random.Random(1),
    new_id=new_id,
    data_dir=Path("/nonexistent"),
    containerd=ContainerdSection(),
    archive_roots=(),
    machines=MachinesSection(),
    libvirt=LibvirtSection(),
    microvm=MicrovmSection(),
    options={},
)


def _fake(context: DriverContext) -> FakeDriver:
    return FakeDriver(FakeConfig(), clock=context.clock)


def _raising(error: Exception) -> DriverFactory:
    def make(_: DriverContext) -> FakeDriver:
        raise error

    return DriverFactory("acme", (InstanceType.CONTAINER,), make)


def _make(*enabled: str, third_party: tuple[EntryPoint, ...] = (), **table: DriverFactory) -> Drivers:
    return make_drivers(
        enabled, CONTEXT, deadlines=DriverDeadlines(), table={**DRIVERS, **table}, third_party=third_party
    )


async def test_virtual_machines_are_run_by_libvirt() -> None:
    (offered,) = _make("vm").offered

    assert (offered.driver.name, offered.types) == ("libvirt", (InstanceType.VM,))
    await offered.driver.aclose()


def test_a_node_without_libvirts_library_says_so_and_offers_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = "hypervisor.agent.drivers.libvirt"
    for name in [name for name in sys.modules if name == "libvirt" or name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    # What importing an extension module without its shared library raises.
    monkeypatch.setitem(sys.modules, "libvirt", None)

    made = _make("vm", "fake")

    assert [offered.driver.name for offered in made.offered] == ["fake"]
    (missing,) = made.missing
    assert (missing.name, missing.types, missing.available) == ("libvirt", (InstanceType.VM,), False)
    assert "libvirt0" in missing.reason


def test_microvms_have_their_driver_by_their_type() -> None:
    (offered,) = _make("microvm").offered

    assert (offered.driver.name, offered.types) == ("microvm", (InstanceType.MICROVM,))


def test_the_fake_driver_runs_every_type() -> None:
    (offered,) = _make("fake").offered

    assert (offered.driver.name, offered.types) == ("fake", tuple(InstanceType))


def test_a_type_belongs_to_the_first_driver_that_runs_it() -> None:
    first = DriverFactory("acme", (InstanceType.VM,), _fake)

    made = _make("acme", "fake", acme=first)

    assert [o.types for o in made.offered] == [
        (InstanceType.VM,),
        (InstanceType.CONTAINER, InstanceType.MICROVM),
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [(Unavailable("no /dev/kvm here"), "no /dev/kvm here"), (ZeroDivisionError("a defect"), "a defect")],
)
def test_a_driver_that_cannot_be_made_says_why_and_the_others_go_on(error: Exception, words: str) -> None:
    made = _make("acme", "fake", acme=_raising(error))

    (missing,) = made.missing
    assert (missing.name, missing.types, missing.available) == ("acme", (InstanceType.CONTAINER,), False)
    assert words in missing.reason
    assert [o.driver.name for o in made.offered] == ["fake"]


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    (missing,) = _make("containr").missing

    assert "containr" in missing.reason
    assert "container" in missing.reason


def _entry_point(monkeypatch: pytest.MonkeyPatch, value: Any) -> EntryPoint:
    module = ModuleType("acme_hypervisor_driver")
    module.FACTORY = value  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "acme_hypervisor_driver", module)
    return EntryPoint("acme", "acme_hypervisor_driver:FACTORY", ENTRY_POINTS)


def test_a_third_partys_driver_comes_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = DriverFactory("acme", (InstanceType.VM,), _fake)

    made = _make("acme", third_party=(_entry_point(monkeypatch, factory),))

    assert [o.types for o in made.offered] == [(InstanceType.VM,)]


def test_an_entry_point_that_is_no_factory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _make("acme", third_party=(_entry_point(monkeypatch, "a string"),))

    assert "DriverFactory" in made.missing[0].reason


def test_an_entry_point_that_is_not_enabled_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _make("fake", third_party=(EntryPoint("acme", "no_such_module:FACTORY", ENTRY_POINTS),))

    assert made.missing == ()
