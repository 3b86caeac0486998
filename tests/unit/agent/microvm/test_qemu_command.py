"""QEMU's command line: what it has, and that no text of a user becomes an option of it."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent.drivers.microvm.qemu_command import (
    Accelerator,
    build_command,
    escape,
    kernel_command_line,
    vsock_cid,
)
from hypervisor.agent.drivers.microvm.vmm import Card, Machine
from hypervisor.core.machines import MicrovmOptions, RateLimit


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "instance_id": "i-1",
        "directory": Path("/d"),
        "run_dir": Path("/r"),
        "vcpus": 2,
        "memory_mib": 128,
    }
    return Machine(**(values | changes))


def command(of: Machine, *, accelerator: Accelerator = Accelerator.TCG) -> tuple[str, ...]:
    return build_command(
        of,
        program=Path("/usr/bin/qemu"),
        setpriv=Path("/setpriv"),
        accelerator=accelerator,
        qmp=of.run_dir / "qmp.sock",
    )


def values(words: tuple[str, ...], option: str) -> list[str]:
    return [after for word, after in itertools.pairwise(words) if word == option]


def devices(words: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    documents = [json.loads(text) for text in values(words, "-device")]
    return {document["driver"]: document for document in documents}


def split(options: str) -> list[str]:
    """A list of options as QEMU splits it: at single commas."""
    parts = re.findall(r"((?:[^,]|,,)*)(?:,|$)", options, re.DOTALL)
    return [part.replace(",,", ",") for part in parts[: None if options.endswith(",") else -1]]


def test_the_least_machine_has_no_devices_but_those_it_cannot_do_without() -> None:
    words = command(machine())

    assert words[0] == "/usr/bin/qemu"
    assert {"-nodefaults", "-no-user-config", "-S"} <= set(words)
    assert set(devices(words)) == {"virtio-rng-pci", "pvpanic-pci"}
    assert values(words, "-blockdev") == values(words, "-netdev") == values(words, "-initrd") == []
    assert values(words, "-smp") == ["2"]
    assert values(words, "-m") == ["128M"]


def test_the_sandbox_is_on_and_allows_no_more_than_changing_the_user() -> None:
    (root,) = values(command(machine()), "-sandbox")
    (unprivileged,) = values(command(machine(uid=2_000_001)), "-sandbox")

    assert root == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    assert unprivileged == root.replace("elevateprivileges=deny", "elevateprivileges=allow")
    words = command(machine(uid=2_000_001))
    assert words[:4] == ("/setpriv", "--no-new-privs", "--", "/usr/bin/qemu")
    assert values(words, "-runas") == ["2000001:2000001"]
    assert values(command(machine()), "-runas") == []


@pytest.mark.parametrize(
    ("accelerator", "accel", "cpu"),
    [(Accelerator.TCG, "tcg,thread=multi,tb-size=64", "max"), (Accelerator.KVM, "kvm", "host")],
)
def test_the_processor_is_that_of_the_accelerator(accelerator: Accelerator, accel: str, cpu: str) -> None:
    words = command(machine(), accelerator=accelerator)

    assert (values(words, "-accel"), values(words, "-cpu")) == ([accel], [cpu])


def test_files_are_named_relative_to_the_root() -> None:
    words = command(machine(initrd=True, disk=True))

    assert (values(words, "-kernel"), values(words, "-initrd")) == (["kernel"], ["initrd"])
    file = json.loads(values(words, "-blockdev")[0])
    assert (file["driver"], file["filename"]) == ("file", "disk.raw")
    assert devices(words)["virtio-blk-pci"]["drive"] == "disk"


def test_a_limited_disk_is_reached_through_its_limit() -> None:
    limit = RateLimit(bytes_per_second=1000, operations_per_second=10)
    words = command(machine(disk=True, options=MicrovmOptions(disk_limit=limit)))

    groups = [json.loads(text) for text in values(words, "-object") if "throttle" in text]
    assert groups == [
        {"qom-type": "throttle-group", "id": "limit", "limits": {"bps-total": 1000, "iops-total": 10}}
    ]
    assert json.loads(values(words, "-blockdev")[-1])["throttle-group"] == "limit"
    assert devices(words)["virtio-blk-pci"]["drive"] == "disk-limited"


def test_each_card_is_plugged_into_its_tap() -> None:
    cards = (Card("tap1", "06:00:00:00:00:01"), Card("tap2", "06:00:00:00:00:02"))
    words = command(machine(cards=cards))

    assert values(words, "-netdev") == [
        "tap,id=net0,ifname=tap1,script=no,downscript=no",
        "tap,id=net1,ifname=tap2,script=no,downscript=no",
    ]
    found = [json.loads(text) for text in values(words, "-device") if "net-pci" in text]
    assert [(d["netdev"], d["mac"]) for d in found] == [("net0", cards[0].mac), ("net1", cards[1].mac)]


def test_options_add_their_devices() -> None:
    words = command(machine(options=MicrovmOptions(balloon=True, vsock=True)))

    assert devices(words)["virtio-balloon-pci"]["deflate-on-oom"] is True
    assert devices(words)["vhost-vsock-pci"]["guest-cid"] == vsock_cid("i-1")


@given(st.text())
def test_guests_have_addresses_that_the_kernel_takes_and_keep_them(instance_id: str) -> None:
    assert 3 <= vsock_cid(instance_id) < 2**32 - 1
    assert vsock_cid(instance_id) == vsock_cid(instance_id)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "console=ttyS0"),
        ("quiet ro", "console=ttyS0 quiet ro"),
        ("console=hvc0 quiet", "console=hvc0 quiet"),
        ("xconsole=1", "console=ttyS0 xconsole=1"),
    ],
)
def test_the_kernel_is_told_its_console_unless_the_specification_does(arguments: str, line: str) -> None:
    assert kernel_command_line(arguments) == line


@given(st.text())
def test_an_escaped_value_is_one_value_to_qemu(value: str) -> None:
    assert split(f"id=x,ifname={escape(value)},script=no") == ["id=x", f"ifname={value}", "script=no"]


HOSTILE = [
    "x,server=off",
    "-snapshot",
    '"},{"driver":"x',
    "$(touch /tmp/x); `id` | x",
    "a\nb\\c'd",
    "json:{}",
    "/dev/fdset/1",
    "x,,y,",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_in_the_word_it_was_put_in(text: str) -> None:
    harmless = command(machine(kernel_args="k", cards=(Card("t", "m"),), disk=True))

    words = command(
        machine(
            instance_id=text,
            run_dir=Path("/" + text.strip("/")),
            kernel_args=text,
            cards=(Card(text, text),),
            disk=True,
        )
    )

    assert len(words) == len(harmless)
    assert [w for w in words if w.startswith("-")][:5] == [w for w in harmless if w.startswith("-")][:5]
    assert values(words, "-append")[0].endswith(text)
    assert f"ifname={text}" in split(values(words, "-netdev")[0])
    assert f"guest={text}" in split(values(words, "-name")[0])
    assert devices(words)["virtio-net-pci"]["mac"] == text
