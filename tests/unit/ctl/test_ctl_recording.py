"""Asciicasts, line by line."""

import json

from hypothesis import given
from hypothesis import strategies as st

from hypervisor.ctl.console.recording import Cast


def _text(lines: list[str]) -> str:
    return "".join(json.loads(line)[2] for line in lines if line)


def test_a_character_that_is_cut_in_two_is_whole() -> None:
    cast = Cast()

    lines = [cast.output(0.1, b"caf\xc3"), cast.output(0.2, b"\xa9!")]

    assert [json.loads(line) for line in lines] == [[0.1, "o", "caf"], [0.2, "o", "\u00e9!"]]


def test_a_character_that_never_ends_is_there_at_the_end() -> None:
    cast = Cast()

    assert cast.output(0.1, b"\xc3") == ""
    assert json.loads(cast.end(0.5)) == [0.5, "o", "\ufffd"]
    assert cast.end(0.6) == ""


def test_time_never_goes_back() -> None:
    cast = Cast()

    lines = [cast.output(2.0, b"a"), cast.resize(1.0, (80, 24)), cast.marker(3.0, "here")]

    assert [json.loads(line) for line in lines] == [[2.0, "o", "a"], [2.0, "r", "80x24"], [3.0, "m", "here"]]


@given(st.lists(st.binary(max_size=20)))
def test_all_output_is_in_it_however_it_is_cut(pieces: list[bytes]) -> None:
    cast = Cast()

    lines = [cast.output(0.0, piece) for piece in pieces]
    lines.append(cast.end(0.0))

    assert _text(lines) == b"".join(pieces).decode("utf-8", "replace")
    assert all(line.count("\n") == 1 for line in lines if line)
