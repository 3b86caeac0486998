import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.core.units import format_bytes, format_duration, parse_bytes, parse_duration


@given(st.integers(min_value=0, max_value=10**12))
def test_a_duration_reads_back_as_it_was_shown(millis: int) -> None:
    assert round(parse_duration(format_duration(millis / 1000)) * 1000) == millis


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_size_reads_back_as_it_was_shown(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("1m30s", 90.0), ("250ms", 0.25), ("1.5h", 5400.0), ("0", 0.0), (0, 0.0)],
)
def test_durations_have_units(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["30", 30, "", "s", "30 s", "-5s", "1h-5s", "1x", "30sec", None, True])
def test_a_duration_without_a_legal_unit_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="such as 30s"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["16MB", "-1", "1.5", "MiB", "", True, 1.5])
def test_a_size_that_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="such as 16MiB"):
        parse_bytes(text)
