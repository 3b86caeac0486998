"""Slots of the sampler that come, go and fail, native and twin alike: nothing leaks, errors are the documented ones."""

import errno
import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from hvtest_stats import SECOND, V2, SamplerType, newest, open_descriptors, tree
from hypervisor.ext.stats_sampler import Sources, _sampler_c


def test_a_file_that_cannot_be_read_leaves_its_fields_unknown(make: SamplerType, tmp_path: Path) -> None:
    root = tree(tmp_path, V2)
    (root / "pids.current").unlink()
    (root / "pids.current").mkdir()  # opens, and reading gives EISDIR
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=root))
        assert sampler.sample(slot, 0, 0)
        record = newest(sampler, slot)

    assert (record.pids, record.memory_used_bytes) == (None, 7_340_032)
    assert sampler.gone() == []


@pytest.mark.parametrize("values", [{"nonsense": 1}, {"cpu_used_cores": 1}, {"pids": -1}, {"pids": 1 << 63}])
def test_figures_that_cannot_be_are_refused(make: SamplerType, values: dict[str, int]) -> None:
    with make() as sampler:
        slot = sampler.add()
        with pytest.raises(ValueError, match=next(iter(values))):
            sampler.store(slot, 0, 0, values)

        assert sampler.latest(slot) is None


def test_a_slot_with_files_takes_no_figures_from_elsewhere(make: SamplerType, tmp_path: Path) -> None:
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=tree(tmp_path, V2)))
        with pytest.raises(ValueError, match="files of its own"):
            sampler.store(slot, 0, 0, {"pids": 1})


def test_a_slot_that_there_is_not_is_a_key_error(make: SamplerType) -> None:
    with make() as sampler:
        slot = sampler.add()
        sampler.remove(slot)
        for call in (
            lambda: sampler.remove(slot),
            lambda: sampler.latest(slot),
            lambda: sampler.history(slot),
            lambda: sampler.sample(slot, 0, 0),
            lambda: sampler.reopen(slot),
            lambda: sampler.store(slot, 0, 0, {}),
        ):
            with pytest.raises(KeyError):
                call()
        assert sampler.add() == slot + 1
        assert sampler.sample_some([slot], 0, 0) == 0


def test_what_is_out_of_range_is_refused(make: SamplerType) -> None:
    for wrong in (
        {"history": 0},
        {"history": (1 << 20) + 1},
        {"slow_period_ns": -1},
        {"min_rate_span_ns": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(**wrong)
    with make() as sampler:
        for times in ((-1, 0), (0, -1), (1 << 63, 0), (0, 1 << 63)):
            with pytest.raises(ValueError, match="times are nanoseconds"):
                sampler.sample_all(*times)
        with pytest.raises(ValueError, match="no field"):
            sampler.select(["nonsense"])
        with pytest.raises(ValueError, match="no field"):
            sampler.totals(["sequence"])


def test_hundreds_come_and_go_between_samples_without_a_leak(make: SamplerType, tmp_path: Path) -> None:
    sources = Sources(cgroup2=tree(tmp_path, V2))
    before = open_descriptors()
    with make(history=2) as sampler:
        alive: list[int] = []
        for turn in range(8):
            alive += [sampler.add(sources) for _ in range(60)]
            for slot in alive[: 30 + turn]:
                sampler.remove(slot)
            del alive[: 30 + turn]
            assert sampler.sample_all(turn * SECOND, 0) == len(alive) == len(sampler)
            assert open_descriptors() - before == sampler.open_files() == len(alive) * len(V2)
        assert sampler.slots() == alive
    assert open_descriptors() == before


def test_a_sampler_that_is_dropped_closes_its_files(tmp_path: Path) -> None:
    before = open_descriptors()
    sampler = _sampler_c.Sampler()
    sampler.add(Sources(cgroup2=tree(tmp_path, V2)))
    assert open_descriptors() == before + len(V2)

    del sampler

    assert open_descriptors() == before


def test_opening_again_keeps_the_history_and_begins_rates_anew(make: SamplerType, tmp_path: Path) -> None:
    old, new = tree(tmp_path / "old", V2), tree(tmp_path / "new", V2)
    (new / "cpu.stat").write_text("usage_usec 99000000\n")
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=old))
        sampler.sample_all(0, 0)
        before = open_descriptors()

        sampler.reopen(slot, Sources(cgroup2=new))
        sampler.sample_all(SECOND, 0)

        assert open_descriptors() == before
        assert [record.cpu_usage_ns for record in sampler.history(slot)] == [2_503_415_000, 99_000_000_000]
        assert newest(sampler, slot).cpu_used_cores is None


def test_opening_again_what_is_not_there_leaves_the_slot_as_it_was(make: SamplerType, tmp_path: Path) -> None:
    with make() as sampler:
        slot = sampler.add(Sources(cgroup2=tree(tmp_path, V2)))
        with pytest.raises(FileNotFoundError):
            sampler.reopen(slot, Sources(cgroup2=tmp_path / "absent"))

        assert sampler.sample(slot, 0, 0)


def test_a_group_that_is_not_there_is_not_added(make: SamplerType, tmp_path: Path) -> None:
    with make() as sampler:
        for sources in (Sources(cgroup2=tmp_path), Sources(cgroup1={"memory": tmp_path / "absent"})):
            with pytest.raises(FileNotFoundError):
                sampler.add(sources)
        with pytest.raises(ValueError, match="not from both"):
            sampler.add(Sources(net_dev="/proc/self/net/dev", tap=tmp_path))

        assert len(sampler) == 0


def test_too_many_open_files_are_an_error_and_leave_nothing_open(make: SamplerType, tmp_path: Path) -> None:
    sources = Sources(cgroup2=tree(tmp_path, V2))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with make() as sampler:
        before = open_descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 64, limits[1]))
        taken: list[int] = []
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for _ in range(3):  # so many of the files can be opened before it fails
                os.close(taken.pop())
            with pytest.raises(OSError, match="Too many open files") as caught:
                sampler.add(sources)
            assert len(sampler) == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in taken:
                os.close(fd)

        assert caught.value.errno == errno.EMFILE
        assert open_descriptors() == before


def test_nothing_is_added_once_closed(make: SamplerType, tmp_path: Path) -> None:
    sampler = make()
    sampler.add(Sources(cgroup2=tree(tmp_path, V2)))
    sampler.close()
    sampler.close()

    with pytest.raises(ValueError, match="closed"):
        sampler.add(Sources(cgroup2=tmp_path))
    assert len(sampler) == 0
