"""What libvirt is told of a virtual machine: golden documents, and values that try to be more than values."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from hypervisor.agent.drivers.libvirt.domain_xml import (
    Card,
    Disk,
    Domain,
    PciAddress,
    build_domain,
    build_snapshot,
    domain_uuid,
    legal_text,
)
from hypervisor.agent.drivers.libvirt.record import METADATA_URI, Record
from hypervisor.core.errors import InvalidArgument

RECORD = Record(
    instance_id="i-1",
    generation=3,
    epoch=2,
    name="box",
    project="default",
    home="/d",
    accelerator="qemu",
    files=("a.kernel",),
)
DOMAIN = Domain(
    record=RECORD,
    kind="qemu",
    vcpus=1,
    max_vcpus=1,
    cpu_millis=1000,
    memory_mb=256,
    max_memory_mb=256,
    console=Path("/d/consoles/i-1/serial"),
    kernel=Path("/d/bases/a.kernel"),
)
HOSTILE = '</name><x a="\'"/>&amp;<![CDATA[ ]]>\n--> %s {} $(id) `id` ../../etc; \\ ü 🦊'

SMALLEST = """\
<domain xmlns:hypervisor="urn:hypervisor:instance:1" type="qemu">
  <name>i-1</name>
  <uuid>{uuid}</uuid>
  <title>default/box</title>
  <metadata>
    <hypervisor:instance id="i-1" generation="3" epoch="2" name="box" \
project="default" home="/d" files="a.kernel" image="" disk="no" uefi="no" accelerator="qemu" accelerator-reason="" />
  </metadata>
  <memory unit="MiB">256</memory>
  <currentMemory unit="MiB">256</currentMemory>
  <vcpu placement="static" current="1">1</vcpu>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    <kernel>/d/bases/a.kernel</kernel>
  </os>
  <features>
    <acpi />
    <apic />
  </features>
  <cpu mode="maximum" check="none" />
  <clock offset="utc">
    <timer name="rtc" tickpolicy="catchup" />
    <timer name="pit" tickpolicy="delay" />
    <timer name="hpet" present="no" />
  </clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <serial type="pipe">
      <source path="/d/consoles/i-1/serial" />
      <target type="isa-serial" port="0" />
    </serial>
    <controller type="usb" model="none" />
    <channel type="unix">
      <target type="virtio" name="org.qemu.guest_agent.0" />
    </channel>
    <rng model="virtio">
      <backend model="random">/dev/urandom</backend>
    </rng>
    <memballoon model="virtio" freePageReporting="on">
      <stats period="2" />
    </memballoon>
    <panic model="isa" />
  </devices>
</domain>"""

DEVICES = """\
<devices>
  <disk type="file" device="disk">
    <driver name="qemu" type="qcow2" discard="unmap" />
    <source file="/d/instances/i-1/disk.qcow2" />
    <backingStore type="file">
      <format type="raw" />
      <source file="/d/bases/b.raw" />
      <backingStore />
    </backingStore>
    <target dev="vda" bus="virtio" />
  </disk>
  <disk type="file" device="disk">
    <driver name="qemu" type="raw" />
    <source file="/d/instances/i-1/seed.iso" />
    <target dev="vdb" bus="virtio" />
    <readonly />
  </disk>
  <interface type="bridge">
    <mac address="52:54:00:00:00:01" />
    <source bridge="br0" />
    <model type="virtio" />
  </interface>
  <hostdev mode="subsystem" type="pci" managed="yes">
    <source>
      <address domain="0x0000" bus="0x1f" slot="0x02" function="0x3" />
    </source>
  </hostdev>"""


def _indented(element: ElementTree.Element) -> str:
    ElementTree.indent(element)
    return ElementTree.tostring(element, encoding="unicode")


def _parsed(domain: Domain) -> ElementTree.Element:
    return ElementTree.fromstring(build_domain(domain))


def test_the_smallest_machine() -> None:
    assert _indented(_parsed(DOMAIN)) == SMALLEST.replace("{uuid}", domain_uuid("i-1"))


def test_disks_cards_and_devices_of_the_node() -> None:
    domain = Domain(
        record=RECORD,
        kind="kvm",
        vcpus=2,
        max_vcpus=4,
        cpu_millis=1500,
        memory_mb=256,
        max_memory_mb=1024,
        console=Path("/d/consoles/i-1/serial"),
        disk=Disk(Path("/d/instances/i-1/disk.qcow2"), ((Path("/d/bases/b.raw"), "raw"),)),
        seed=Path("/d/instances/i-1/seed.iso"),
        cards=(Card("br0", "52:54:00:00:00:01"),),
        host_devices=(PciAddress(0, 0x1F, 2, 3),),
        uefi=True,
    )

    root = _parsed(domain)

    assert root.get("type") == "kvm"
    devices = root.find("devices")
    assert devices is not None
    assert _indented(devices).startswith(DEVICES)
    assert root.findtext("memory") == "1024"
    assert root.findtext("currentMemory") == "256"
    vcpu, cpu = root.find("vcpu"), root.find("cpu")
    assert vcpu is not None
    assert (vcpu.text, vcpu.get("current")) == ("4", "2")
    assert cpu is not None
    assert cpu.get("mode") == "host-passthrough"
    assert root.findtext("cputune/global_quota") == "150000"
    boot = root.find("os")
    assert boot is not None
    assert boot.get("firmware") == "efi"
    assert [feature.attrib for feature in boot.findall("firmware/feature")] == [
        {"enabled": "no", "name": "secure-boot"},
        {"enabled": "no", "name": "enrolled-keys"},
    ]


def test_an_empty_disk_has_no_base_that_could_be_guessed() -> None:
    domain = Domain(
        record=RECORD,
        kind="qemu",
        vcpus=1,
        max_vcpus=1,
        cpu_millis=1000,
        memory_mb=64,
        max_memory_mb=64,
        console=Path("/c"),
        disk=Disk(Path("/d.qcow2")),
    )

    store = _parsed(domain).find("devices/disk/backingStore")

    assert store is not None
    assert (list(store), dict(store.attrib)) == ([], {})


def test_values_stay_values_whatever_is_in_them() -> None:
    record = replace(RECORD, name=HOSTILE, project=HOSTILE)
    domain = Domain(
        record=record,
        kind="qemu",
        vcpus=1,
        max_vcpus=1,
        cpu_millis=1000,
        memory_mb=64,
        max_memory_mb=64,
        console=Path(f"/d/{HOSTILE}"),
        kernel=Path(f"/d/{HOSTILE}"),
        initrd=Path(f"/i/{HOSTILE}"),
        kernel_args=HOSTILE,
        disk=Disk(Path(f"/disk/{HOSTILE}")),
        cards=(Card(HOSTILE, "52:54:00:00:00:01"),),
    )

    root = _parsed(domain)

    assert root.findtext("os/kernel") == f"/d/{HOSTILE}"
    assert root.findtext("os/initrd") == f"/i/{HOSTILE}"
    assert root.findtext("os/cmdline") == HOSTILE
    assert root.findtext("title") == f"{HOSTILE}/{HOSTILE}"
    for path, attribute, wanted in (
        ("devices/disk/source", "file", f"/disk/{HOSTILE}"),
        ("devices/interface/source", "bridge", HOSTILE),
        ("devices/serial/source", "path", f"/d/{HOSTILE}"),
        (f"metadata/{{{METADATA_URI}}}instance", "name", HOSTILE),
    ):
        found = root.find(path)
        assert found is not None
        assert found.get(attribute) == wanted
    assert {child.tag for child in root} == {child.tag for child in _parsed(DOMAIN)}


def test_the_name_of_a_snapshot_stays_a_name() -> None:
    assert ElementTree.fromstring(build_snapshot(HOSTILE)).findtext("name") == HOSTILE


@pytest.mark.parametrize("character", ["\0", "\x01", "\x1b", "\x7f\x0b", "\ud800", "\ufffe", "\uffff"])
def test_what_xml_cannot_hold_is_refused_with_the_field(character: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        legal_text(f"a{character}b", "spec.kernel_args")

    assert caught.value.metadata["field"] == "spec.kernel_args"
    assert "U+" in caught.value.message


def test_what_xml_can_hold_is_left_as_it_is() -> None:
    assert legal_text(HOSTILE, "name") is HOSTILE


def test_the_uuid_is_the_instances_own_and_always_the_same() -> None:
    assert domain_uuid("i-1") == domain_uuid("i-1")
    assert domain_uuid("i-1") != domain_uuid("i-2")
