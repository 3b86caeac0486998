"""What of a specification the libvirt driver refuses, and what it makes of the rest."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.libvirt.config import LibvirtConfig
from hypervisor.agent.drivers.libvirt.specification import Wanted, check
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.machines import CloudInit, Firmware, MicrovmOptions, NetworkInterface, VmOptions
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType

BOOTS = InstanceSpec(kernel_path="/boot/vmlinuz", memory_mb=128)


@pytest.fixture
def config(tmp_path: Path) -> LibvirtConfig:
    (tmp_path / "0000:01:00.0").mkdir()
    return LibvirtConfig(
        uri="test:///default",
        data_dir=tmp_path,
        bridges=("br0",),
        host_devices=("0000:01:00.0", "0000:02:00.0"),
        pci_root=tmp_path,
    )


def _assignment(spec: InstanceSpec, **more: object) -> Assignment:
    settings: dict[str, object] = {
        "instance_id": "i-1",
        "name": "box",
        "project": "p",
        "type": InstanceType.VM,
    }
    return Assignment(**(settings | {"spec": spec} | more))  # type: ignore[arg-type]


def _check(config: LibvirtConfig, spec: InstanceSpec) -> Wanted:
    return check(_assignment(spec), config)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (InstanceSpec(), "spec.image"),
        (replace(BOOTS, command=("sh",)), "spec.command"),
        (replace(BOOTS, env={"A": "1"}), "spec.env"),
        (replace(BOOTS, working_dir="/"), "spec.working_dir"),
        (replace(BOOTS, microvm=MicrovmOptions()), "spec.microvm"),
        (InstanceSpec(image="/i", initrd_path="/x"), "spec.initrd_path"),
        (InstanceSpec(image="/i", kernel_args="quiet"), "spec.kernel_args"),
        (replace(BOOTS, kernel_args="a\0b"), "spec.kernel_args"),
        (replace(BOOTS, kernel_args="a\x1bb"), "spec.kernel_args"),
        (replace(BOOTS, cpu_millis=4000, vm=VmOptions(max_cpus=2)), "spec.vm.max_cpus"),
        (replace(BOOTS, vm=VmOptions(max_cpus=300)), "spec.vm.max_cpus"),
        (replace(BOOTS, vm=VmOptions(max_memory_mb=64)), "spec.vm.max_memory_mb"),
        (replace(BOOTS, networks=(NetworkInterface(bridge="br1"),)), "spec.networks[0].bridge"),
        (replace(BOOTS, networks=(NetworkInterface(bridge="br0'/><x"),)), "spec.networks[0].bridge"),
        (
            replace(
                BOOTS, networks=(NetworkInterface(bridge="br0"), NetworkInterface(bridge="br0", mac="x"))
            ),
            "spec.networks[1].mac",
        ),
        (
            replace(BOOTS, networks=(NetworkInterface(bridge="br0", mac="ff:ff:ff:ff:ff:ff"),)),
            "spec.networks[0].mac",
        ),
        (
            replace(BOOTS, networks=(NetworkInterface(bridge="br0", mac="52:54:00:00:00:01\n"),)),
            "spec.networks[0].mac",
        ),
        (replace(BOOTS, vm=VmOptions(host_devices=("../../etc",))), "spec.vm.host_devices[0]"),
        (replace(BOOTS, vm=VmOptions(host_devices=("0000:01:00.0\n",))), "spec.vm.host_devices[0]"),
        (replace(BOOTS, vm=VmOptions(host_devices=("0000:03:00.0",))), "spec.vm.host_devices[0]"),
        (
            replace(BOOTS, vm=VmOptions(host_devices=("0000:01:00.0", "0000:02:00.0"))),
            "spec.vm.host_devices[1]",
        ),
        (replace(BOOTS, cloud_init=CloudInit(hostname="a\nb")), "spec.cloud_init.hostname"),
        (
            replace(BOOTS, cloud_init=CloudInit(ssh_authorized_keys=("ok", "ssh-rsa A\nroot"))),
            "spec.cloud_init.ssh_authorized_keys[1]",
        ),
        (replace(BOOTS, cloud_init=CloudInit(user_data="x" * ((1 << 20) + 1))), "spec.cloud_init.user_data"),
        (replace(BOOTS, cloud_init=CloudInit(user_data="\ud800")), "spec.cloud_init.user_data"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_field(
    config: LibvirtConfig, spec: InstanceSpec, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _check(config, spec)

    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize("instance_id", ["", "a/b", "../a", "a b", "a\n", "a\0", "-a", "x" * 65, "a'\"<>&"])
def test_an_id_that_cannot_name_a_domain_or_a_directory_is_refused(
    config: LibvirtConfig, instance_id: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(_assignment(BOOTS, instance_id=instance_id), config)

    assert caught.value.metadata["field"] == "id"


@pytest.mark.parametrize("field", ["name", "project"])
def test_names_that_xml_cannot_hold_are_refused(config: LibvirtConfig, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(_assignment(BOOTS, **{field: "a\0"}), config)

    assert caught.value.metadata["field"] == field


def test_other_types_are_refused(config: LibvirtConfig) -> None:
    with pytest.raises(InvalidArgument, match="not container"):
        check(_assignment(BOOTS, type=InstanceType.CONTAINER), config)


@pytest.mark.parametrize(("millis", "vcpus"), [(1, 1), (1000, 1), (1001, 2), (2500, 3), (8000, 8)])
def test_processors_are_whole_and_enough(config: LibvirtConfig, millis: int, vcpus: int) -> None:
    wanted = _check(config, replace(BOOTS, cpu_millis=millis))

    assert (wanted.vcpus, wanted.max_vcpus, wanted.cpu_millis) == (vcpus, vcpus, millis)


def test_maxima_firmware_and_devices_are_taken_over(config: LibvirtConfig) -> None:
    options = VmOptions(firmware=Firmware.UEFI, max_cpus=4, max_memory_mb=512, host_devices=("0000:01:00.0",))

    wanted = _check(config, replace(BOOTS, vm=options))

    assert (wanted.max_vcpus, wanted.max_memory_mb, wanted.uefi) == (4, 512, True)
    assert [(d.domain, d.bus, d.slot, d.function) for d in wanted.host_devices] == [(0, 1, 0, 0)]


def test_addresses_of_cards_are_derived_from_the_id_and_differ(config: LibvirtConfig) -> None:
    spec = replace(BOOTS, networks=(NetworkInterface(bridge="br0"), NetworkInterface(bridge="br0")))

    first, again = _check(config, spec), _check(config, spec)

    assert first.cards == again.cards
    assert len({card.mac for card in first.cards}) == 2
    assert all(card.mac.startswith("52:54:00:") for card in first.cards)
    other = check(_assignment(spec, instance_id="i-2"), config)
    assert not {card.mac for card in other.cards} & {card.mac for card in first.cards}
