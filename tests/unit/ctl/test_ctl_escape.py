"""The key that leaves a console."""

import pytest

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.console.escape import describe_escape, parse_escape, split_at_escape


@pytest.mark.parametrize(
    ("text", "byte", "shown"),
    [
        ("^]", b"\x1d", "Ctrl-]"),
        ("ctrl-]", b"\x1d", "Ctrl-]"),
        ("Ctrl-A", b"\x01", "Ctrl-A"),
        ("^a", b"\x01", "Ctrl-A"),
        ("~", b"~", "~"),
        ("^", b"^", "^"),
        ("none", b"", ""),
    ],
)
def test_reads_and_shows(text, byte, shown):
    assert parse_escape(text) == byte
    assert describe_escape(byte) == shown


@pytest.mark.parametrize("text", ["", "ab", "^1", "ctrl-", "ctrl-é", "é"])
def test_refuses(text):
    with pytest.raises(InvalidArgument, match="--escape"):
        parse_escape(text)


@pytest.mark.parametrize(
    ("typed", "kept", "left"),
    [(b"abc", b"abc", False), (b"ab\x1dc", b"ab", True), (b"\x1d", b"", True), (b"", b"", False)],
)
def test_what_was_typed_before_the_escape_is_kept(typed, kept, left):
    assert split_at_escape(typed, b"\x1d") == (kept, left)


def test_without_an_escape_everything_passes():
    assert split_at_escape(bytes(range(256)), b"") == (bytes(range(256)), False)
