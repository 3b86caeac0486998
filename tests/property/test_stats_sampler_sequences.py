"""Whatever is done to it, the native sampler holds what its Python twin holds: records, rates, rings, sums."""

import math
import tempfile
from pathlib import Path
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.ext.stats_sampler import COUNTERS, FIELDS, UNLIMITED, Sources, _sampler_c, _sampler_py

HISTORY = 5
SLOW_PERIOD_NS = 3_000
MIN_SPAN_NS = 40

NUMBERS = st.one_of(st.integers(0, 5_000), st.integers(0, UNLIMITED), st.just(UNLIMITED))
JUNK = st.sampled_from(["", "\n", "max\n", "not a number\n", "5", "\0\n", "x" * 3_500 + "\n"])


def _flat(*names: str) -> st.SearchStrategy[str]:
    return st.lists(st.tuples(st.sampled_from(names), NUMBERS), max_size=6).map(
        lambda pairs: "".join(f"{name} {value}\n" for name, value in pairs)
    )


NUMBER = NUMBERS.map(lambda value: f"{value}\n")
PRESSURE = st.tuples(NUMBERS, NUMBERS).map(
    lambda both: f"some avg10=0.1 avg60=0.1 avg300=0.1 total={both[0]}\nfull avg10=0.0 total={both[1]}\n"
)
IO = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3).map(
    lambda rows: "".join(f"8:{i} rbytes={r} wbytes={w} rios=1 wios=2\n" for i, (r, w) in enumerate(rows))
)
FILES: dict[str, st.SearchStrategy[str]] = {
    "cpu.stat": _flat("usage_usec", "nr_periods", "nr_throttled", "throttled_usec", "user_usec"),
    "memory.current": NUMBER,
    "memory.max": NUMBER,
    "memory.stat": _flat("anon", "file", "inactive_file", "pgmajfault"),
    "memory.events": _flat("oom", "oom_kill"),
    "io.stat": IO,
    "pids.current": NUMBER,
    "cpu.pressure": PRESSURE,
    "io.pressure": PRESSURE,
    "rx_bytes": NUMBER,
    "tx_packets": NUMBER,
}
SLOT = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 9])
STEP = st.sampled_from([0, 1, 39, 40, 1_000, 2_999, 3_000, -500])
WRITE = st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(st.just("write"), st.just(name), st.one_of(FILES[name], FILES[name], JUNK))
)
STORED = st.dictionaries(st.sampled_from(COUNTERS), NUMBERS, max_size=6)
ACTION = st.one_of(
    WRITE,
    WRITE,
    WRITE,
    st.tuples(st.just("sample_all"), STEP),
    st.tuples(st.just("sample_all"), STEP),
    st.tuples(st.just("sample"), STEP, SLOT, st.booleans()),
    st.tuples(st.just("sample_some"), STEP, st.lists(SLOT, max_size=4), st.booleans()),
    st.tuples(st.just("store"), STEP, SLOT, STORED),
    st.tuples(st.just("add"), STEP, st.booleans()),
    st.tuples(st.just("reopen"), STEP, SLOT),
    st.tuples(st.just("remove"), STEP, SLOT),
)


AnySampler: TypeAlias = "_sampler_c.Sampler | _sampler_py.Sampler"


def _do(sampler: AnySampler, action: tuple[object, ...], *, now: int, sources: Sources) -> object:
    """Do it; what the call gave, or the kind of error it raised."""
    try:
        match action:
            case ("sample_all", _):
                return sampler.sample_all(now, now + 1)
            case ("sample", _, int(slot), bool(everything)):
                return sampler.sample(slot, now, now + 1, everything=everything)
            case ("sample_some", _, list(slots), bool(everything)):
                return sampler.sample_some(slots, now, 5, everything=everything)
            case ("store", _, int(slot), dict(values)):
                sampler.store(slot, now, now + 1, values)
            case ("add", _, bool(with_files)):
                return sampler.add(sources if with_files else None)
            case ("reopen", _, int(slot)):
                sampler.reopen(slot, sources)
            case ("remove", _, int(slot)):
                sampler.remove(slot)
            case _:
                raise AssertionError(action)
    except (KeyError, ValueError) as error:
        return type(error)
    return None


def _look(sampler: AnySampler, after: int) -> object:
    """All that can be read out of a sampler."""
    return (
        sampler.slots(),
        sampler.gone(),
        len(sampler),
        sampler.open_files(),
        [(sampler.latest(slot), sampler.history(slot)) for slot in sampler.slots()],
        [sampler.history(slot, after_sequence=after, limit=3) for slot in sampler.slots()],
        [sampler.history(slot, since_monotonic_ns=after * 700) for slot in sampler.slots()],
        sampler.select(("sequence", "known", *FIELDS)),
        sampler.totals(COUNTERS),
    )


def _same_sums(mine: tuple[float | None, ...], theirs: tuple[float | None, ...]) -> bool:
    """Sums of rates: equal but for the order in which they were added up."""
    return all(
        a is b is None or (a is not None and b is not None and math.isclose(a, b))
        for a, b in zip(mine, theirs, strict=True)
    )


@settings(max_examples=300, deadline=None)
@given(actions=st.lists(ACTION, min_size=20, max_size=60))
def test_native_and_twin_hold_the_same_after_any_sequence(actions: list[tuple[object, ...]]) -> None:
    now = 10_000
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in FILES:
            (root / name).write_text("1\n")
        sources = Sources(cgroup2=root, tap=root)
        settings_of_both = {
            "history": HISTORY,
            "slow_period_ns": SLOW_PERIOD_NS,
            "min_rate_span_ns": MIN_SPAN_NS,
        }
        native = _sampler_c.Sampler(**settings_of_both)
        twin = _sampler_py.Sampler(**settings_of_both)
        with native, twin:
            for sampler in (native, twin):
                sampler.add(sources)
                sampler.add()
            for action in actions:
                if action[0] == "write":
                    (root / str(action[1])).write_text(str(action[2]))
                    continue
                assert isinstance(action[1], int)
                now = max(0, now + action[1])
                mine, theirs = (_do(sampler, action, now=now, sources=sources) for sampler in (native, twin))
                assert mine == theirs, action
                assert _look(native, now % 4) == _look(twin, now % 4), action
                rates = FIELDS[len(COUNTERS) :]
                assert _same_sums(native.totals(rates), twin.totals(rates)), action
