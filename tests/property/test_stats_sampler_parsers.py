"""The native parsers do what their Python twins specify, for any bytes: fuzzed, and with text as kernels write it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hypervisor.ext.stats_sampler import UNLIMITED, _sampler_c, _sampler_py
from hypervisor.ext.stats_sampler._files import _PRESSURE, _V1, _V2, KINDS, Format

WORDS = st.one_of(
    st.sampled_from(
        sorted(
            {key.name for kind in KINDS for key in kind.keys if key.name}
            | {
                b"some",
                b"full",
                b"total",
                b"max",
                b"8:0",
                b"lo:",
                b"eth0:",
                b"lo",
                b":",
                b"-1",
                b"x",
                b"avg10=0.00",
            }
        )
    ),
    st.integers(0, 1 << 70).map(lambda number: str(number).encode()),
    st.integers(UNLIMITED - 9, UNLIMITED + 9).map(lambda number: str(number).encode()),
    st.binary(max_size=12),
)
BREAKS = st.sampled_from([b" ", b"\n", b"=", b"\t", b"  \n", b"\0", b"", b": ", b"total=", b"\r\n"])
TEXTS = st.one_of(
    st.binary(max_size=300),
    st.lists(st.tuples(WORDS, BREAKS), max_size=60).map(
        lambda pairs: b"".join(word + after for word, after in pairs)
    ),
)
ONE_OF_EACH_FORMAT = [
    next(index for index, kind in enumerate(KINDS) if kind.format == wanted) for wanted in Format
] + [
    next(index for index, kind in enumerate(KINDS) if len(kind.keys) == 2 and kind.format == Format.PRESSURE)
]


@pytest.mark.parametrize("kind", ONE_OF_EACH_FORMAT, ids=lambda kind: f"{KINDS[kind].format.name}-{kind}")
@settings(max_examples=1500)
@given(text=TEXTS)
@example(text=b"")
@example(text=b"\n")
@example(text=b"lo: 1 2 3 4 5 6 7 8 9 10\n")
@example(text=b"99999999999999999999999x 9223372036854775807 9223372036854775808")
def test_any_bytes_are_parsed_as_the_twin_parses_them(kind: int, text: bytes) -> None:
    assert _sampler_c.parse(kind, text) == _sampler_py.parse(kind, text)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@given(text=TEXTS)
def test_every_kind_of_file_is_known_to_the_native_parser(kind: int, text: bytes) -> None:
    values = _sampler_c.parse(kind, text)

    assert len(values) == len(KINDS[kind].keys)
    assert values == _sampler_py.parse(kind, text)


NUMBERS = st.integers(0, 1 << 62)


@given(
    interfaces=st.dictionaries(
        st.from_regex(r"(?!lo$)[a-z][a-z0-9]{0,8}", fullmatch=True),
        st.lists(st.integers(0, 1 << 50), min_size=16, max_size=16),
        max_size=8,
    ),
    loopback=st.lists(NUMBERS, min_size=16, max_size=16),
)
def test_all_interfaces_but_loopback_are_added_up(
    interfaces: dict[str, list[int]], loopback: list[int]
) -> None:
    rows = {"lo": loopback} | interfaces
    text = "Inter-| Receive | Transmit\n face |bytes packets|bytes packets\n" + "".join(
        f"{name:>6}: {' '.join(map(str, row))}\n" for name, row in rows.items()
    )
    kind = next(index for index, kind in enumerate(KINDS) if kind.format == Format.NET_DEV)

    expected = tuple(sum(row[column] for row in interfaces.values()) for column in (0, 1, 8, 9))
    assert _sampler_c.parse(kind, text.encode()) == expected
    assert _sampler_py.parse(kind, text.encode()) == expected


@given(devices=st.lists(st.tuples(*[st.integers(0, 1 << 50)] * 4), max_size=6))
def test_all_devices_are_added_up(devices: list[tuple[int, int, int, int]]) -> None:
    text = "".join(
        f"8:{index * 16} rbytes={r} wbytes={w} rios={ri} wios={wi} dbytes=7 dios=7\n"
        for index, (r, w, ri, wi) in enumerate(devices)
    )
    kind = next(index for index, kind in enumerate(KINDS) if kind.keys[0].name == b"rbytes")

    expected = tuple(sum(column) for column in zip(*devices, strict=True)) or (0, 0, 0, 0)
    assert _sampler_c.parse(kind, text.encode()) == expected
    assert _sampler_py.parse(kind, text.encode()) == expected


def _kind_of(path: str) -> int:
    """The kind of file that the sampler takes a file of that name to be, of version 2 or, with a controller, of 1."""
    controller, _, name = path.rpartition("/")
    known = {("", name): kind for name, kind in (_V2 | _PRESSURE).items()} | _V1
    return KINDS.index(known[controller, name])


FIELD = st.integers(0, 1 << 60)
NOISE = [
    "user_usec",
    "inactive_anon",
    "nr_bursts",
    "oom",
    "cache",
    "rss",
    "low",
    "usage_usec_x",
    "total_rss_huge",
]


def _flat(names: list[str]) -> st.SearchStrategy[tuple[str, tuple[int, ...]]]:
    """Lines of a name and a number, in any order, among lines that nothing reads; and the numbers of the names."""

    def text(numbers: tuple[int, ...]) -> st.SearchStrategy[tuple[str, tuple[int, ...]]]:
        lines = [f"{name} {number}\n" for name, number in zip(names, numbers, strict=True)]
        others = [f"{name} 77\n" for name in NOISE if name not in names]
        return st.permutations(lines + others).map(lambda mixed: ("".join(mixed), numbers))

    return st.tuples(*[FIELD] * len(names)).flatmap(text)


def _devices(line: str, columns: int) -> st.SearchStrategy[tuple[str, tuple[int, ...]]]:
    """Lines of several devices, and the sums over all of them."""
    rows = st.lists(st.tuples(*[st.integers(0, 1 << 50)] * columns), max_size=6)
    return rows.map(
        lambda devices: (
            "".join(line.format(*row, device=f"254:{16 * i}") for i, row in enumerate(devices)) + "Total 9\n",
            tuple(sum(column) for column in zip(*devices, strict=True)) or (0,) * columns,
        )
    )


def _pressure(count: int) -> st.SearchStrategy[tuple[str, tuple[int, ...]]]:
    some_full = (
        "some avg10=0.31 avg60=1.00 avg300=9.99 total={}\nfull avg10=0.00 avg60=0.0 avg300=0.0 total={}\n"
    )
    return st.tuples(FIELD, FIELD).map(lambda both: (some_full.format(*both), both[:count]))


NUMBER = FIELD.map(lambda number: (f"{number}\n", (number,)))
BLKIO = "".join(
    f"{{device}} {what}\n" for what in ("Read {0}", "Write {1}", "Sync 5", "Async 6", "Discard 0", "Total 11")
)
WRITTEN = {
    "cpu.stat": _flat(["usage_usec", "nr_periods", "nr_throttled", "throttled_usec"]),
    "memory.stat": _flat(["anon", "file", "pgmajfault", "inactive_file"]),
    "memory.events": _flat(["oom_kill"]),
    "memory.current": NUMBER,
    "memory.max": NUMBER,
    "memory.swap.current": NUMBER,
    "pids.current": NUMBER,
    "io.stat": _devices("{device} rbytes={0} wbytes={1} rios={2} wios={3} dbytes=7 dios=7\n", 4),
    "cpu.pressure": _pressure(1),
    "memory.pressure": _pressure(2),
    "io.pressure": _pressure(2),
    "cpuacct/cpuacct.usage": NUMBER,
    "cpu/cpu.stat": _flat(["nr_periods", "nr_throttled", "throttled_time"]),
    "memory/memory.usage_in_bytes": NUMBER,
    "memory/memory.limit_in_bytes": NUMBER,
    "memory/memory.stat": _flat(
        ["total_rss", "total_cache", "total_swap", "total_pgmajfault", "total_inactive_file"]
    ),
    "memory/memory.oom_control": _flat(["oom_kill"]),
    "blkio/blkio.throttle.io_service_bytes": _devices(BLKIO, 2),
    "pids/pids.current": NUMBER,
}


def test_every_file_of_a_group_has_a_test_below() -> None:
    assert {_kind_of(path) for path in WRITTEN} == {
        KINDS.index(kind) for kind in (*_V2.values(), *_PRESSURE.values(), *_V1.values())
    }
    assert len(WRITTEN) == len(_V2 | _PRESSURE) + len(_V1)


@pytest.mark.parametrize("path", sorted(WRITTEN))
@given(data=st.data())
def test_what_the_kernel_writes_is_read_back(path: str, data: st.DataObject) -> None:
    text, expected = data.draw(WRITTEN[path])

    assert _sampler_c.parse(_kind_of(path), text.encode()) == expected
    assert _sampler_py.parse(_kind_of(path), text.encode()) == expected


@pytest.mark.parametrize("path", sorted(WRITTEN))
@given(data=st.data())
def test_a_file_cut_off_or_damaged_anywhere_is_read_as_the_twin_reads_it(
    path: str, data: st.DataObject
) -> None:
    text = bytearray(data.draw(WRITTEN[path])[0].encode())
    end = data.draw(st.integers(0, len(text)))
    for place in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=3)) if text else []:
        text[place] = data.draw(st.integers(0, 255))

    for damaged in (bytes(text), bytes(text[:end]), bytes(text[end:])):
        assert _sampler_c.parse(_kind_of(path), damaged) == _sampler_py.parse(_kind_of(path), damaged)


@pytest.mark.parametrize("parse", [_sampler_c.parse, _sampler_py.parse], ids=["native", "twin"])
class TestBoth:
    def test_pressure_is_that_of_its_line(self, parse: object) -> None:
        text = b"some avg10=0.31 avg60=0.12 avg300=0.02 total=39834414\nfull avg10=0.00 avg60=0.0 avg300=0.0 total=17\n"

        assert parse(ONE_OF_EACH_FORMAT[-1], text) == (39834414, 17)  # type: ignore[operator]

    def test_a_name_and_a_number_of_different_lines_are_no_pair(self, parse: object) -> None:
        assert parse(ONE_OF_EACH_FORMAT[Format.KEYED], b"nr_periods\n5\n")[1] is None  # type: ignore[operator]

    def test_a_number_too_large_counts_as_the_largest(self, parse: object) -> None:
        for text in (b"max\n", b"99999999999999999999\n", b"9223372036854775808"):
            assert parse(ONE_OF_EACH_FORMAT[Format.NUMBER], text) == (UNLIMITED,)  # type: ignore[operator]

    def test_what_is_no_number_is_not_known(self, parse: object) -> None:
        for text in (b"", b"\n", b"-1\n", b"1x\n", b"12.5\n", b"maximum\n", b"\x00\n"):
            assert parse(ONE_OF_EACH_FORMAT[Format.NUMBER], text) == (None,)  # type: ignore[operator]

    def test_a_kind_that_there_is_not_is_an_index_error(self, parse: object) -> None:
        with pytest.raises(IndexError):
            parse(len(KINDS), b"")  # type: ignore[operator]
