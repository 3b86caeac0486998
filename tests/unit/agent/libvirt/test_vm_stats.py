"""Figures of virtual machines out of what libvirt tells of a domain."""

from hypervisor.agent.drivers.libvirt.stats import figures_of
from hypervisor.ext.stats_sampler import COUNTERS

ROW = {
    "state.state": 1,
    "cpu.time": 3_308_880_000,
    "balloon.current": 131_072,
    "balloon.maximum": 196_608,
    "balloon.major_fault": 7,
    "balloon.unused": 64_732,
    "balloon.available": 91_256,
    "balloon.usable": 69_144,
    "balloon.rss": 212_824,
    "net.count": 2,
    "net.0.rx.bytes": 10,
    "net.0.rx.pkts": 1,
    "net.0.tx.bytes": 20,
    "net.1.rx.bytes": 5,
    "block.count": 2,
    "block.0.rd.bytes": 4608,
    "block.0.rd.reqs": 2,
    "block.1.rd.bytes": 512,
    "block.1.wr.bytes": 1024,
    "block.1.wr.reqs": 3,
}


def test_all_that_a_running_guest_with_a_balloon_driver_tells() -> None:
    assert figures_of(ROW) == {
        "cpu_usage_ns": 3_308_880_000,
        "memory_limit_bytes": 128 << 20,
        "memory_used_bytes": (91_256 - 64_732) << 10,
        "memory_working_set_bytes": (91_256 - 69_144) << 10,
        "major_faults": 7,
        "block_read_bytes": 5120,
        "block_read_ops": 2,
        "block_write_bytes": 1024,
        "block_write_ops": 3,
        "network_receive_bytes": 15,
        "network_receive_packets": 1,
        "network_transmit_bytes": 20,
    }


def test_every_figure_has_a_name_that_the_sampler_knows() -> None:
    assert set(figures_of(ROW)) <= set(COUNTERS)


def test_without_a_balloon_driver_it_is_what_qemu_holds_up_to_the_guests_memory() -> None:
    assert figures_of({"balloon.current": 1024, "balloon.rss": 512}) == {
        "memory_limit_bytes": 1 << 20,
        "memory_used_bytes": 1 << 19,
    }
    assert figures_of({"balloon.current": 1024, "balloon.rss": 9999})["memory_used_bytes"] == 1 << 20


def test_a_busy_domain_tells_what_is_known_without_its_qemu() -> None:
    assert figures_of({"state.state": 1, "cpu.time": 5}) == {"cpu_usage_ns": 5}


def test_figures_that_contradict_one_another_stay_within_bounds() -> None:
    row = {"balloon.current": 100, "balloon.available": 50, "balloon.unused": 80, "balloon.usable": 90}

    figures = figures_of(row)

    assert (figures["memory_used_bytes"], figures["memory_working_set_bytes"]) == (0, 0)
