"""A machine's network card, plugged into a real bridge of the node."""

import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from hvtest_driver_stats import sampled
from hvtest_driver_watching import read_until
from hvtest_vms import VmBench, answer, vm_assignment
from hypervisor.agent.drivers.libvirt import LibvirtDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.machines import NetworkInterface

pytestmark = pytest.mark.timeout(180)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def bridge() -> Iterator[str]:
    name = f"hv{os.getpid()}"
    ip("link", "add", name, "type", "bridge")
    try:
        ip("addr", "add", "198.51.100.1/24", "dev", name)
        ip("link", "set", name, "up")
        yield name
    finally:
        ip("link", "del", name)


async def test_a_card_reaches_the_node_and_its_traffic_is_counted(
    bench: VmBench, driver: LibvirtDriver, bridge: str
) -> None:
    networked = LibvirtDriver(bench.config(bridges=(bridge,)), clock=SystemClock(), rng=random.Random(7))
    spec = bench.spec(
        "GUEST_IP=198.51.100.2/24", networks=(NetworkInterface(bridge=bridge, mac="52:54:00:12:34:56"),)
    )
    made = vm_assignment(spec, instance_id=new_id("i"))
    try:
        await networked.create(made)
        await networked.start(made.instance_id)
        console = await networked.attach(made.instance_id)
        await read_until(console, b"READY")

        assert await answer(console, "cat /sys/class/net/eth0/address") == "52:54:00:12:34:56"
        assert "3 packets received" in await answer(console, "ping -c 3 -s 1000 198.51.100.1")
        stats = await sampled(networked, made.instance_id)
        assert stats.network_receive_bytes is not None
        assert stats.network_transmit_bytes is not None
        assert min(stats.network_receive_bytes, stats.network_transmit_bytes) >= 3000

        await networked.delete(made.instance_id)
        assert "vnet" not in ip("link", "show", "master", bridge)
    finally:
        await networked.aclose()
