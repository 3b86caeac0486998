"""The one parser of names and labels: legal, or a violation that says what is wrong and how to mend it."""

import re
from collections.abc import Mapping

from hypervisor.core.errors import FieldViolation

__all__ = [
    "MAX_LABELS",
    "MAX_TAINTS",
    "check_dns_label",
    "check_hostname",
    "check_labels",
    "shorten",
]

MAX_LABELS = 64
MAX_TAINTS = 16
"""Taints of one node, the agent's and the users' together."""
_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_HOSTNAME_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
_LABEL_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def shorten(text: str, limit: int = 64) -> str:
    """The text for an error message: quoted, at most ``limit`` characters of it (input may be 10 MB)."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def check_dns_label(field: str, value: str) -> FieldViolation | None:
    """Names of instances and projects: 1 to 63 of a-z, 0-9, ``-``; a letter first, no ``-`` last."""
    if not value:
        return FieldViolation(field, "is required: give 1 to 63 of a-z, 0-9 and '-', beginning with a letter")
    if len(value) > 63:
        return FieldViolation(field, f"is {len(value)} characters long: use at most 63")
    if not _DNS_LABEL.fullmatch(value):
        return FieldViolation(
            field,
            f"{shorten(value)} is not a legal name: use 1 to 63 of a-z, 0-9 and '-', "
            "beginning with a letter and not ending with '-'",
        )
    return None


def check_hostname(field: str, value: str) -> FieldViolation | None:
    """Host names: dot-separated parts of letters, digits, ``-`` and ``_``; at most 253 characters."""
    if not value:
        return FieldViolation(field, "is required: give the node's host name")
    if len(value) > 253 or not all(_HOSTNAME_PART.fullmatch(part) for part in value.split(".")):
        return FieldViolation(field, f"{shorten(value)} is not a legal host name")
    return None


def _legal_key(key: str) -> bool:
    parts = key.split("/")
    return 1 <= len(parts) <= 2 and all(_LABEL_PART.fullmatch(part) for part in parts)


def check_labels(field: str, labels: Mapping[str, str]) -> tuple[FieldViolation, ...]:
    """Keys ``name`` or ``prefix/name`` and values of at most 63 characters a part; values may be empty."""
    if len(labels) > MAX_LABELS:
        return (FieldViolation(field, f"has {len(labels)} labels: use at most {MAX_LABELS}"),)
    found = []
    for key, value in labels.items():
        if not _legal_key(key):
            found.append(
                FieldViolation(
                    field,
                    f"key {shorten(key)} is not legal: use at most 63 letters, digits, '.', '_' and '-', "
                    "beginning and ending with a letter or digit, with at most one '/'",
                )
            )
        elif value and not _LABEL_PART.fullmatch(value):
            found.append(
                FieldViolation(
                    f"{field}.{key}",
                    f"value {shorten(value)} is not legal: use at most 63 letters, digits, '.', '_' and '-'",
                )
            )
    return tuple(found)
