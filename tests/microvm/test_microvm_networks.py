"""Network cards of the real Firecracker: taps in a bridge of the node, and nothing of them afterwards."""

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from hvtest_driver_stats import sampled
from hvtest_microvms import FirecrackerBench, answer, assignment, missing, pid_of, started
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.agent.drivers.microvm.taps import tap_mac, tap_name
from hypervisor.core.errors import FailedPrecondition, InvalidArgument
from hypervisor.core.machines import MicrovmOptions, NetworkInterface, RateLimit, SnapshotKind
from hypervisor.core.states import InstanceStatus

NET = Path("/sys/class/net")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def bridge() -> Iterator[str]:
    if why := missing():
        pytest.skip(why)
    name = f"hvt{os.getpid()}"
    try:
        ip("link", "add", name, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"no bridge can be made here: {exc}")
    yield name
    ip("link", "del", name)


@pytest.fixture
def networked(bridge: str) -> Iterator[FirecrackerBench]:
    with FirecrackerBench(bridges=(bridge, "absent0")) as node:
        yield node
        assert node.leftovers() == {}
        assert list((NET / bridge / "brif").iterdir()) == []


@pytest.fixture
async def micro(networked: FirecrackerBench) -> AsyncIterator[MicrovmDriver]:
    driver = networked.driver()
    yield driver
    for seen in await driver.list():
        await driver.delete(seen.instance_id)
    await driver.aclose()


async def test_each_card_is_a_tap_in_its_bridge_until_the_run_ends(
    networked: FirecrackerBench, micro: MicrovmDriver, bridge: str
) -> None:
    cards = (NetworkInterface(bridge=bridge), NetworkInterface(bridge=bridge, mac="06:00:00:00:00:07"))
    instance_id = await started(micro, replace(networked.shell(), networks=cards))
    taps = [tap_name(instance_id, index) for index in range(2)]

    shown = await networked.vmm().configuration(micro.machine(instance_id))
    plugged = sorted(path.name for path in (NET / bridge / "brif").iterdir())
    seen = await sampled(micro, instance_id)
    await micro.stop(instance_id, grace_s=0.0)

    assert plugged == sorted(taps)
    assert [(card["host_dev_name"], card["guest_mac"]) for card in shown["network-interfaces"]] == [
        (taps[0], tap_mac(instance_id, 0)),
        (taps[1], "06:00:00:00:00:07"),
    ]
    assert seen.network_receive_bytes is not None
    assert not any((NET / tap).exists() for tap in taps)
    # And again.
    await micro.start(instance_id)
    await answer(micro, instance_id, "echo again", "again\r\nagain\r\n")


async def test_metadata_and_limits_are_configured_and_metadata_is_there_after_going_back(
    networked: FirecrackerBench, micro: MicrovmDriver, bridge: str
) -> None:
    spec = replace(
        networked.shell(),
        networks=(NetworkInterface(bridge=bridge),),
        microvm=MicrovmOptions(
            metadata='{"role": "web", "x": {"y": [1, "</a>"]}}',
            network_limit=RateLimit(bytes_per_second=4096),
        ),
    )
    instance_id = await started(micro, spec)
    vmm, machine = networked.vmm(), micro.machine(instance_id)

    shown = await vmm.configuration(machine)
    await micro.create_snapshot(instance_id, "kept", kind=SnapshotKind.FULL)
    restored = await micro.restore_snapshot(instance_id, "kept")
    told = await vmm.metadata(machine)

    assert shown["mmds-config"]["version"] == "V2"
    assert shown["network-interfaces"][0]["tx_rate_limiter"]["bandwidth"]["size"] == 4096
    assert restored.status is InstanceStatus.RUNNING
    assert told == {"role": "web", "x": {"y": [1, "</a>"]}}


async def test_a_vmm_that_died_leaves_no_tap(
    networked: FirecrackerBench, micro: MicrovmDriver, bridge: str
) -> None:
    spec = replace(networked.shell(), networks=(NetworkInterface(bridge=bridge),))
    instance_id = await started(micro, spec)
    await micro.aclose()
    os.kill(pid_of(networked, instance_id), 9)
    other = networked.driver()

    assert await other.delete(instance_id)

    assert not (NET / tap_name(instance_id, 0)).exists()
    await other.aclose()


async def test_a_bridge_that_is_not_there_is_told(
    networked: FirecrackerBench, micro: MicrovmDriver, bridge: str
) -> None:
    spec = replace(networked.shell(), networks=(NetworkInterface(bridge="absent0"),))

    with pytest.raises(InvalidArgument) as caught:
        await micro.create(assignment(spec))

    assert caught.value.metadata["field"] == "spec.networks[0].bridge"


async def test_a_bridge_that_went_away_fails_the_start_and_leaves_nothing(
    networked: FirecrackerBench, micro: MicrovmDriver, bridge: str
) -> None:
    made = assignment(replace(networked.shell(), networks=(NetworkInterface(bridge=bridge),)))
    await micro.create(made)
    ip("link", "del", bridge)

    try:
        with pytest.raises(FailedPrecondition) as caught:
            await micro.start(made.instance_id)
    finally:
        ip("link", "add", bridge, "type", "bridge")

    assert caught.value.reason == "NETWORK_REFUSED"
    assert not (NET / tap_name(made.instance_id, 0)).exists()
