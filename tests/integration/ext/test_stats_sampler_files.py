"""The sampler over recorded trees of files, native and twin alike: what is read, rates, rings, sums."""

import os
from pathlib import Path

import pytest

from hvtest_stats import NET_DEV, SECOND, V1, V2, SamplerType, newest, tree, v1
from hypervisor.ext import stats_sampler
from hypervisor.ext.stats_sampler import Sources, _sampler_c, _sampler_py


def test_the_native_sampler_is_the_one_in_use() -> None:
    pure = os.environ.get("HYPERVISOR_EXT_PURE") == "1"

    assert stats_sampler.implementation == ("python" if pure else "native")
    assert stats_sampler.Sampler is (_sampler_py.Sampler if pure else _sampler_c.Sampler)
    assert _sampler_c.__file__.endswith(".so")


def test_both_versions_give_the_same_figures(make: SamplerType, tmp_path: Path) -> None:
    (tmp_path / "dev").write_text(NET_DEV)
    two = Sources(cgroup2=tree(tmp_path / "two", V2), net_dev=tmp_path / "dev")
    one = Sources(cgroup1=v1(tree(tmp_path / "one", V1)), net_dev=tmp_path / "dev")

    for sources in (one, two):
        with make() as sampler:
            slot = sampler.add(sources)
            assert sampler.sample(slot, 5 * SECOND, 1_700_000_000 * SECOND)
            record = newest(sampler, slot)

        assert (record.sequence, record.monotonic_ns, record.wall_ns) == (
            1,
            5 * SECOND,
            1_700_000_000 * SECOND,
        )
        assert record.cpu_usage_ns == 2_503_415_000
        assert (record.cpu_periods, record.cpu_throttled_periods) == (41, 7)
        assert record.cpu_throttled_ns == 350_021_000
        assert record.memory_used_bytes == 7_340_032
        assert record.memory_working_set_bytes == 7_340_032 - 4_194_304
        assert record.memory_limit_bytes == 67_108_864
        assert (record.memory_anon_bytes, record.memory_file_bytes) == (1_228_800, 5_578_752)
        assert (record.memory_swap_bytes, record.major_faults, record.oom_kills) == (8_192, 21, 2)
        assert record.pids == 5
        assert (record.block_read_bytes, record.block_write_bytes) == (1_052_672, 12_288)
        assert (record.network_receive_bytes, record.network_transmit_bytes) == (1520, 703)
        assert (record.network_receive_packets, record.network_transmit_packets) == (11, 9)
        assert record.cpu_used_cores is None
        assert record.network_receive_bytes_per_s is None
        ops = (21, 3) if sources is two else (None, None)
        assert (record.block_read_ops, record.block_write_ops) == ops
        pressure = (1_500_000, 300_000, 200_000, 70_000, 60_000) if sources is two else (None,) * 5
        assert (
            record.cpu_pressure_some_ns,
            record.memory_pressure_some_ns,
            record.memory_pressure_full_ns,
            record.io_pressure_some_ns,
            record.io_pressure_full_ns,
        ) == pressure


def test_a_hybrid_has_pressure_beside_its_controllers_of_version_one(
    make: SamplerType, tmp_path: Path
) -> None:
    sources = Sources(cgroup1=v1(tree(tmp_path / "one", V1)), cgroup2=tree(tmp_path / "two", V2))
    (tmp_path / "one/pids/pids.current").write_text("77\n")

    with make() as sampler:
        slot = sampler.add(sources)
        sampler.sample_all(0, 0)
        record = newest(sampler, slot)

    assert (record.pids, record.block_read_ops, record.cpu_pressure_some_ns) == (77, None, 1_500_000)


def test_rates_are_those_between_two_samples(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, V2)
    (root / "dev").write_text(NET_DEV)
    with make(slow_period_ns=0) as sampler:
        slot = sampler.add(Sources(cgroup2=root, net_dev=root / "dev"))
        sampler.sample_all(SECOND, 0)

        (root / "cpu.stat").write_text(
            "usage_usec 4503415\nnr_periods 61\nnr_throttled 12\nthrottled_usec 9\n"
        )
        (root / "io.stat").write_text("254:0 rbytes=5052672 wbytes=12288 rios=41 wios=3\n")
        (root / "dev").write_text(NET_DEV.replace(" 1500 10 ", " 9500 10 "))
        (root / "memory.pressure").write_text("some total=1000300\nfull total=200\n")
        sampler.sample_all(5 * SECOND, 0)
        record = newest(sampler, slot)

    assert record.cpu_used_cores == pytest.approx(0.5)
    assert record.cpu_throttled_share == pytest.approx(0.25)
    assert (record.block_read_bytes_per_s, record.block_write_bytes_per_s) == (1_000_000.0, 0.0)
    assert (record.block_read_ops_per_s, record.block_write_ops_per_s) == (5.0, 0.0)
    assert (record.network_receive_bytes_per_s, record.network_transmit_bytes_per_s) == (2000.0, 0.0)
    assert record.memory_pressure_some == pytest.approx(0.25)
    assert record.memory_pressure_full == 0.0


def test_a_counter_that_went_backwards_has_no_rate_once(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, V2)
    cores = []
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=root))
        for second, usage in enumerate((1_000_000, 2_000_000, 500_000, 1_500_000)):
            (root / "cpu.stat").write_text(f"usage_usec {usage}\n")
            sampler.sample_all(second * SECOND, 0)
            cores.append(newest(sampler, slot).cpu_used_cores)

    assert cores == [None, 1.0, None, 1.0]


def test_a_sample_soon_after_another_repeats_its_rates(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, V2)
    cores = []
    with make(min_rate_span_ns=SECOND) as sampler:
        slot = sampler.add(Sources(cgroup2=root))
        for at, usage in ((0, 0), (SECOND, 1_000_000), (SECOND + 9, 3_000_000), (3 * SECOND, 2_000_000)):
            (root / "cpu.stat").write_text(f"usage_usec {usage}\n")
            sampler.sample_all(at, 0)
            cores.append(newest(sampler, slot).cpu_used_cores)

    assert cores == [None, 1.0, 1.0, 0.5]


def test_slow_files_are_read_in_their_own_period_and_spread_over_it(
    make: SamplerType, tmp_path: Path
) -> None:
    root = tree(tmp_path, V2)
    read_at: dict[int, list[int]] = {}
    with make(slow_period_ns=1600) as sampler:
        for _ in range(16):
            sampler.add(Sources(cgroup2=root))
        sampler.sample_all(0, 0)
        for now in range(100, 3300, 100):
            (root / "memory.stat").write_text(f"anon {now}\n")
            sampler.sample_all(now, 0)
            for slot, anon in sampler.select(["memory_anon_bytes"]):
                assert isinstance(slot, int)
                assert anon is not None
                if anon == now:
                    read_at.setdefault(slot, []).append(now)

    first = {slot: times[0] for slot, times in read_at.items()}
    assert sorted(first.values()) == list(range(100, 1700, 100))
    assert all(times == [times[0], times[0] + 1600] for times in read_at.values())


def test_everything_is_read_when_asked_for(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, V2)
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=root))
        sampler.sample(slot, 0, 0)
        (root / "memory.max").write_text("max\n")

        sampler.sample(slot, 1, 0)
        assert newest(sampler, slot).memory_limit_bytes == 67_108_864
        sampler.sample(slot, 2, 0, everything=True)
        assert newest(sampler, slot).memory_limit_bytes is None


def test_no_limit_of_version_one_is_no_number(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, V1)
    (root / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    with make() as sampler:
        slot = sampler.add(Sources(cgroup1=v1(root)))
        sampler.sample(slot, 0, 0)

        assert newest(sampler, slot).memory_limit_bytes is None


def test_a_controller_that_is_not_there_leaves_its_fields_unknown(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, {name: text for name, text in V2.items() if not name.startswith(("memory", "io"))})
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=root, net_dev=root / "absent"))
        assert sampler.sample(slot, 0, 0)
        record = newest(sampler, slot)

    assert record.cpu_usage_ns == 2_503_415_000
    assert (record.memory_used_bytes, record.memory_working_set_bytes, record.block_read_bytes) == (
        None,
        None,
        None,
    )
    assert (record.network_receive_bytes, record.memory_pressure_some_ns) == (None, None)
    known = [name for bit, name in enumerate(stats_sampler.FIELDS) if record.known >> bit & 1]
    assert known == [name for name in stats_sampler.FIELDS if getattr(record, name) is not None]


def test_a_group_that_did_no_input_or_output_has_zero(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, V2)
    (root / "io.stat").write_text("")
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=root))
        sampler.sample(slot, 0, 0)

        assert newest(sampler, slot)[newest(sampler, slot)._fields.index("block_read_bytes")] == 0


def test_a_tap_is_seen_from_the_instance(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, {"rx_bytes": "1\n", "tx_bytes": "2\n", "rx_packets": "3\n", "tx_packets": "4\n"})
    with make() as sampler:
        slot = sampler.add(Sources(tap=root))
        sampler.sample(slot, 0, 0)
        record = newest(sampler, slot)

    assert (record.network_receive_bytes, record.network_transmit_bytes) == (2, 1)
    assert (record.network_receive_packets, record.network_transmit_packets) == (4, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 " + "x" * 65_533 + "\n", 7),
        ("7 " + "x" * 65_534 + "\n", None),
        ("", None),
        ("7", 7),
        ("\n" * 5_000 + "7\n", 7),
    ],
    ids=["longest", "too long", "empty", "cut off", "in pages"],
)
def test_files_of_any_length_are_read_or_unknown(
    make: SamplerType, tmp_path: Path, text: str, expected: int | None
) -> None:
    (tmp_path / "pids.current").write_text(text)
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=tmp_path))
        sampler.sample(slot, 0, 0)

        assert newest(sampler, slot).pids == expected


def test_figures_from_elsewhere_have_rates_and_history_too(make: SamplerType) -> None:
    with make() as sampler:
        slot = sampler.add()
        assert not sampler.sample(slot, 0, 0)
        sampler.store(slot, 0, 7, {"cpu_usage_ns": 0, "block_read_ops": 10, "memory_working_set_bytes": 5})
        sampler.store(slot, 2 * SECOND, 8, {"cpu_usage_ns": SECOND, "block_read_ops": 30})

        first, second = sampler.history(slot)
        assert (first.memory_working_set_bytes, first.cpu_used_cores) == (5, None)
        assert (second.memory_working_set_bytes, second.cpu_used_cores) == (None, 0.5)
        assert (second.block_read_ops_per_s, second.wall_ns) == (10.0, 8)


def test_the_ring_keeps_the_newest(make: SamplerType) -> None:
    with make(history=3) as sampler:
        slot = sampler.add()
        for second in range(7):
            sampler.store(slot, second, 0, {"pids": second})

        def pids(**what: int) -> list[int | None]:
            return [record.pids for record in sampler.history(slot, **what)]

        assert [record.sequence for record in sampler.history(slot)] == [5, 6, 7]
        assert pids(after_sequence=6) == [6]
        assert pids(since_monotonic_ns=5) == [5, 6]
        assert pids(limit=2) == [5, 6]
        assert pids(limit=0) == []
        assert pids(after_sequence=7) == []


def test_sums_are_over_what_is_known(make: SamplerType) -> None:
    with make() as sampler:
        slots = [sampler.add() for _ in range(3)]
        for slot, values in zip(slots, ({"pids": 3}, {"pids": 4, "oom_kills": 1}, {}), strict=True):
            sampler.store(slot, 0, 0, values)

        assert sampler.totals(["oom_kills", "pids", "major_faults", "pids"]) == (1, 7, None, 7)
        assert sampler.select(["pids", "oom_kills"]) == [(1, 3, None), (2, 4, 1), (3, None, None)]
