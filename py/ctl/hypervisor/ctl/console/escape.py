"""The key that leaves a console, found in what is typed. No terminal, no network: bytes in, bytes and a verdict out."""

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.names import shorten

__all__ = ["describe_escape", "parse_escape", "split_at_escape"]


def parse_escape(text: str) -> bytes:
    """The byte of ``^]`` or ``ctrl-]`` (any control character so), of a single character, or none for ``none``."""
    if text == "none":
        return b""
    lowered = text.lower()
    char = text[1:] if text.startswith("^") and len(text) == 2 else ""
    if lowered.startswith("ctrl-") and len(text) == 6:
        char = text[5:]
    if char:
        code = ord(char.upper()) ^ 0x40
        if char.isascii() and (code < 0x20 or code == 0x7F):
            return bytes([code])
    elif len(text) == 1 and text.isascii():
        return text.encode("ascii")
    raise InvalidArgument.of_field(
        "--escape", f"{shorten(text)}: write a control character as ^] or ctrl-], a single character, or none"
    )


def describe_escape(escape: bytes) -> str:
    """The escape as it is written on a keyboard, such as ``Ctrl-]``; empty where there is none."""
    if not escape:
        return ""
    code = escape[0]
    return f"Ctrl-{chr(code ^ 0x40)}" if code < 0x20 or code == 0x7F else chr(code)


def split_at_escape(typed: bytes, escape: bytes) -> tuple[bytes, bool]:
    """What was typed before the escape, and whether the escape was there."""
    if not escape:
        return typed, False
    before, found, _ = typed.partition(escape)
    return before, bool(found)
