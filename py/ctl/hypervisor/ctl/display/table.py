"""Plain tables for terminals and pipes: columns padded to their widest cell, counted in terminal cells.

On a terminal that is too narrow the columns marked ``shrinks`` are cut with an ellipsis; in a pipe nothing is.
Control characters are shown escaped, so that text from elsewhere cannot drive the terminal.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Column", "cell_width", "cut", "harmless", "layout", "render"]

T = TypeVar("T")
_GAP = "   "
_NARROWEST = 6


class Column(NamedTuple, Generic[T]):
    """One column: its heading, the text of a row, where it is shown and whether it may be cut."""

    heading: str
    text: Callable[[T], str]
    wide: bool = False
    """Only with ``-o wide``."""
    shrinks: bool = False
    """May be cut on a narrow terminal."""
    right: bool = False
    """Numbers: aligned at their end."""


def cell_width(text: str) -> int:
    """Columns of a terminal that the text takes: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    import unicodedata

    width = 0
    for char in text:
        if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
            continue
        width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return width


def harmless(text: str) -> str:
    """The text with control characters, line breaks included, written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cut(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis, in at most ``width`` terminal columns."""
    if cell_width(text) <= width:
        return text
    kept = ""
    used = 0
    for char in text:
        wide = cell_width(char)
        if used + wide > width - 1:
            break
        kept += char
        used += wide
    return kept + "…"


def layout(
    columns: Sequence[Column[T]], rows: Sequence[Sequence[str]], *, headers: bool, width: int | None
) -> list[int]:
    """The width of each column: its widest cell, less where the terminal is narrow."""
    widths = [
        max([cell_width(column.heading) if headers else 0, *(cell_width(row[i]) for row in rows)])
        for i, column in enumerate(columns)
    ]
    if width is None:
        return widths
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    while excess > 0:
        candidates = [i for i, c in enumerate(columns) if c.shrinks and widths[i] > _NARROWEST]
        if not candidates:
            break
        widest = max(candidates, key=lambda i: widths[i])
        widths[widest] -= 1
        excess -= 1
    return widths


def render(
    columns: Sequence[Column[T]],
    items: Sequence[T],
    *,
    wide: bool = False,
    headers: bool = True,
    width: int | None = None,
    at_least: int = 0,
) -> list[str]:
    """The lines of the table. ``width`` is the terminal's, None where the output is no terminal.

    ``at_least`` is the narrowest a column gets, for tables that are printed row by row.
    """
    shown = [column for column in columns if wide or not column.wide]
    rows = [[harmless(column.text(item)) or "-" for column in shown] for item in items]
    widths = [max(at_least, w) for w in layout(shown, rows, headers=headers, width=width)]
    lines = [[column.heading for column in shown], *rows] if headers else rows
    return [_GAP.join(_cells(shown, line, widths)).rstrip() for line in lines]


def _cells(columns: Sequence[Column[T]], texts: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = []
    for column, text, width in zip(columns, texts, widths, strict=True):
        fitted = cut(text, width)
        padding = " " * (width - cell_width(fitted))
        cells.append(padding + fitted if column.right else fitted + padding)
    return cells
