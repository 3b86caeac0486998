"""What only machines have in a specification: each wrong field is named, each right one passes."""

from typing import Any

import pytest

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.api.instance_requests import draft_of
from hypervisor.v1 import compute_pb2, instance_pb2
from hypervisor.wire.instances import spec_to_wire

VM, MICROVM, CONTAINER = "VM", "MICROVM", "CONTAINER"


def request(kind: str, **spec: Any) -> compute_pb2.CreateInstanceRequest:
    """A create of an instance of that type."""
    number = instance_pb2.InstanceType.Value(f"INSTANCE_TYPE_{kind}")
    wanted = instance_pb2.InstanceSpec(image="debian-12", memory_mb=512, cpu_cores=2, **spec)
    return compute_pb2.CreateInstanceRequest(
        instance=instance_pb2.Instance(name="web", type=number, spec=wanted)
    )


def wrong_fields(kind: str, **spec: Any) -> list[str]:
    """The fields named in the refusal."""
    with pytest.raises(InvalidArgument) as refused:
        draft_of(request(kind, **spec))
    return [violation.field.removeprefix("instance.spec.") for violation in refused.value.violations]


def test_everything_legal_comes_back_from_the_domain_as_it_was_sent() -> None:
    sent = request(
        MICROVM,
        cloud_init={
            "hostname": "web",
            "ssh_authorized_keys": ["ssh-ed25519 AAAA me"],
            "user_data": "#!/bin/sh\n",
        },
        networks=[{"bridge": "br0"}, {"bridge": "br0", "mac": "52:54:00:12:34:56"}],
        microvm={
            "vmm": "VMM_QEMU",
            "metadata": '{"role": "web"}',
            "vsock": True,
            "balloon": True,
            "disk_limit": {"bytes_per_second": 1_000_000},
        },
    )

    draft = draft_of(sent)

    kept = spec_to_wire(draft.spec)
    for field in ("cloud_init", "networks", "microvm"):
        assert getattr(kept, field) == getattr(sent.instance.spec, field)
    assert not kept.HasField("vm")


def test_a_virtual_machine_with_its_options_is_legal() -> None:
    options = {
        "firmware": "FIRMWARE_UEFI",
        "host_devices": ["0000:01:00.0", "0000:01:00.1"],
        "max_cpus": 8,
        "max_memory_mb": 1024,
    }

    draft = draft_of(request(VM, vm=options))

    assert spec_to_wire(draft.spec).vm == instance_pb2.VmOptions(**options)


@pytest.mark.parametrize(
    ("kind", "spec", "fields"),
    [
        (CONTAINER, {"cloud_init": {}}, ["cloud_init"]),
        (CONTAINER, {"networks": [{"bridge": "br0"}]}, ["networks"]),
        (CONTAINER, {"vm": {}}, ["vm"]),
        (VM, {"microvm": {}}, ["microvm"]),
        (MICROVM, {"vm": {}}, ["vm"]),
        (VM, {"cloud_init": {"hostname": "no spaces"}}, ["cloud_init.hostname"]),
        (VM, {"cloud_init": {"hostname": "x\n- evil: true"}}, ["cloud_init.hostname"]),
        (VM, {"cloud_init": {"ssh_authorized_keys": ["garbage"]}}, ["cloud_init.ssh_authorized_keys[0]"]),
        (
            VM,
            {"cloud_init": {"ssh_authorized_keys": ["ssh-rsa AAAA\nruncmd: x"]}},
            ["cloud_init.ssh_authorized_keys[0]"],
        ),
        (VM, {"cloud_init": {"ssh_authorized_keys": ["a b"] * 65}}, ["cloud_init.ssh_authorized_keys"]),
        (VM, {"cloud_init": {"user_data": "x" * 16_385}}, ["cloud_init.user_data"]),
        (VM, {"cloud_init": {"user_data": "a\0b"}}, ["cloud_init.user_data"]),
        (VM, {"cloud_init": {"network_config": "a\0b"}}, ["cloud_init.network_config"]),
        (VM, {"networks": [{"bridge": ""}]}, ["networks[0].bridge"]),
        (VM, {"networks": [{"bridge": "../br0"}]}, ["networks[0].bridge"]),
        (VM, {"networks": [{"bridge": "br0'/>"}]}, ["networks[0].bridge"]),
        (VM, {"networks": [{"bridge": "a" * 16}]}, ["networks[0].bridge"]),
        (VM, {"networks": [{"bridge": "br0", "mac": "52:54:00"}]}, ["networks[0].mac"]),
        (VM, {"networks": [{"bridge": "br0", "mac": "01:00:5e:00:00:01"}]}, ["networks[0].mac"]),
        (VM, {"networks": [{"bridge": "br0", "mac": "02:00:00:00:00:01"}] * 2}, ["networks[1].mac"]),
        (VM, {"networks": [{"bridge": "br0"}] * 9}, ["networks"]),
        (VM, {"vm": {"host_devices": ["01:00.0"]}}, ["vm.host_devices[0]"]),
        (VM, {"vm": {"host_devices": ["0000:01:00.0"] * 2}}, ["vm.host_devices[1]"]),
        (VM, {"vm": {"host_devices": ["0000:01:00.0,x=y"]}}, ["vm.host_devices[0]"]),
        (VM, {"vm": {"max_cpus": 1}}, ["vm.max_cpus"]),
        (VM, {"vm": {"max_memory_mb": 256}}, ["vm.max_memory_mb"]),
        (VM, {"vm": {"firmware": "FIRMWARE_UEFI"}, "kernel_path": "/boot/vmlinuz"}, ["vm.firmware"]),
        (VM, {"vm": {"firmware": 77}}, ["vm.firmware"]),
        (MICROVM, {"microvm": {"vmm": 77}}, ["microvm.vmm"]),
        (MICROVM, {"microvm": {"metadata": "{"}}, ["microvm.metadata"]),
        (MICROVM, {"microvm": {"metadata": "[1]"}}, ["microvm.metadata"]),
        (MICROVM, {"microvm": {"metadata": "[" * 20_000}}, ["microvm.metadata"]),
        (
            MICROVM,
            {"microvm": {"disk_limit": {"bytes_per_second": -1}}},
            ["microvm.disk_limit.bytes_per_second"],
        ),
    ],
)
def test_a_wrong_field_is_named(kind: str, spec: dict[str, Any], fields: list[str]) -> None:
    assert wrong_fields(kind, **spec) == fields
