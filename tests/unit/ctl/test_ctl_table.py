"""Tables: widths in terminal cells, narrow terminals, harmless text."""

from dataclasses import dataclass

import pytest

from hypervisor.ctl.display.table import Column, cell_width, cut, harmless, render


@dataclass(frozen=True)
class Row:
    name: str
    size: str = "1"
    note: str = ""


COLUMNS = [
    Column[Row]("NAME", lambda r: r.name),
    Column[Row]("SIZE", lambda r: r.size, right=True),
    Column[Row]("NOTE", lambda r: r.note, shrinks=True),
    Column[Row]("MORE", lambda r: "x", wide=True),
]


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [Row("web", "10", "ok"), Row("database", "2")]

    assert render(COLUMNS, rows) == [
        "NAME       SIZE   NOTE",
        "web          10   ok",
        "database      2   -",
    ]


def test_wide_shows_more_and_headers_can_be_left_out():
    assert render(COLUMNS, [Row("a", "1", "n")], wide=True, headers=False) == ["a   1   n   x"]


def test_wide_characters_take_two_cells_and_combining_ones_none():
    rows = [Row("日本", "1", "a"), Row("e\u0301", "1", "b"), Row("plain", "1", "c")]

    lines = render(COLUMNS, rows)

    assert [cell_width(line[: line.rindex("   ")]) for line in lines[1:]] == [12, 12, 12]
    assert lines[1].startswith("日本    ")


def test_narrow_terminal_cuts_what_may_shrink_and_nothing_else():
    rows = [Row("a-rather-long-name", "123", "a message that does not fit on this line")]

    lines = render(COLUMNS, rows, width=50)

    assert lines[1] == "a-rather-long-name    123   a message that does n…"
    assert all(cell_width(line) <= 50 for line in lines)


def test_a_terminal_far_too_narrow_keeps_the_other_columns():
    lines = render(COLUMNS, [Row("name", "123", "a long message")], width=10)

    assert lines[1] == "name    123   a lon…"


def test_a_pipe_cuts_nothing():
    assert render(COLUMNS, [Row("n", "1", "m" * 500)])[1].endswith("m" * 500)


@pytest.mark.parametrize(
    ("text", "width", "expected"), [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("日本語", 5, "日本…")]
)
def test_cut(text, width, expected):
    assert cut(text, width) == expected


def test_control_characters_are_shown_not_sent():
    assert harmless("a\x1b[31mb\nc\u202e") == "a\\x1b[31mb\\nc\\u202e"
    assert render(COLUMNS, [Row("\x1b]0;title\x07")])[1].startswith("\\x1b]0;title\\x07")
