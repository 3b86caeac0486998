"""The native parser of control group files does what its Python twin specifies, for all input."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.ext.stats_sampler import _parser_c, _parser_py

WORDS = st.one_of(
    st.sampled_from(
        [b"usage_usec", b"oom_kill", b"rbytes", b"Read", b"8:0", b"max", b"maximum", b"x", b"-1", b"+1"]
    ),
    st.integers(0, 1 << 70).map(lambda number: str(number).encode()),
    st.binary(max_size=12),
)
TEXTS = st.one_of(
    st.binary(max_size=300),
    st.lists(st.tuples(WORDS, st.sampled_from([b" ", b"\n", b"=", b"\t", b"  \n", b"\0"]))).map(
        lambda pairs: b"".join(word + separator for word, separator in pairs)
    ),
)
NAMES = st.lists(st.one_of(st.just(b""), WORDS), max_size=8).map(tuple)


@given(TEXTS, NAMES)
def test_native_and_twin_parse_alike(text: bytes, names: tuple[bytes, ...]) -> None:
    assert _parser_c.parse_counters(text, names) == _parser_py.parse_counters(text, names)


@given(st.dictionaries(st.from_regex(rb"[a-z_]{1,12}", fullmatch=True), st.integers(0, 1 << 62), max_size=20))
def test_every_key_of_a_flat_keyed_file_is_read(values: dict[bytes, int]) -> None:
    text = b"".join(key + b" " + str(value).encode() + b"\n" for key, value in values.items())

    assert _parser_c.parse_counters(text, tuple(values)) == tuple(values.values())


def _descriptor_of(data: bytes) -> int:
    fd = os.memfd_create("counters")
    os.write(fd, data)
    return fd


@pytest.mark.parametrize("implementation", [_parser_c, _parser_py], ids=["native", "twin"])
class TestBoth:
    def test_a_file_is_read_from_its_beginning_every_time(self, implementation: object) -> None:
        fd = _descriptor_of(b"nr_throttled 1\n")
        try:
            assert implementation.read_counters(fd, (b"nr_throttled", b"absent")) == (1, None)  # type: ignore[attr-defined]
            os.pwrite(fd, b"nr_throttled 2\n", 0)
            assert implementation.read_counters(fd, (b"nr_throttled",)) == (2,)  # type: ignore[attr-defined]
        finally:
            os.close(fd)

    def test_lines_of_devices_are_added_up(self, implementation: object) -> None:
        text = b"8:0 rbytes=1 wbytes=10 rios=3\n8:16 rbytes=2 wbytes=20 rios=4\n"

        assert implementation.parse_counters(text, (b"rbytes", b"wbytes")) == (3, 30)  # type: ignore[attr-defined]

    def test_max_and_what_is_larger_count_as_unlimited(self, implementation: object) -> None:
        for text in (b"max\n", b"99999999999999999999\n"):
            assert implementation.parse_counters(text, (b"",)) == ((1 << 63) - 1,)  # type: ignore[attr-defined]

    def test_a_closed_descriptor_is_an_os_error(self, implementation: object) -> None:
        fd = _descriptor_of(b"")
        os.close(fd)

        with pytest.raises(OSError, match="Bad file descriptor"):
            implementation.read_counters(fd, (b"",))  # type: ignore[attr-defined]

    def test_a_file_longer_than_the_limit_is_refused(self, implementation: object) -> None:
        limit: int = implementation.MAX_FILE_BYTES  # type: ignore[attr-defined]
        for size, fits in ((limit, True), (limit + 1, False)):
            fd = _descriptor_of(b"7 " + b"x" * (size - 2))
            try:
                if fits:
                    assert implementation.read_counters(fd, (b"",)) == (7,)  # type: ignore[attr-defined]
                else:
                    with pytest.raises(ValueError, match="longer than"):
                        implementation.read_counters(fd, (b"",))  # type: ignore[attr-defined]
            finally:
                os.close(fd)


def test_more_names_than_can_be_read_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        _parser_c.parse_counters(b"", (b"x",) * 65)


def test_the_native_parser_is_the_one_in_use() -> None:
    from hypervisor.ext import stats_sampler

    assert os.environ.get("HYPERVISOR_EXT_PURE") != "1"
    assert stats_sampler.implementation == "native"
    assert stats_sampler.read_counters is _parser_c.read_counters
