"""Collecting every wrong field of a request, so that a user mends them in one go, and the checks all requests share."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.ids import is_id
from hypervisor.core.names import check_dns_label, check_labels, shorten

__all__ = ["DEFAULT_PROJECT", "Violations"]

DEFAULT_PROJECT = "default"
MAX_REQUEST_ID = 64
MAX_OBJECT_NAME = 253
"""Longest id, instance name or host name."""


class Violations:
    """The wrong fields found so far; :meth:`check` raises them all."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """A wrong field: its path and a sentence that says how to mend it."""
        self._found.append(FieldViolation(field, description))

    def extend(self, *found: FieldViolation | None) -> None:
        """What the checks of ``core.names`` return."""
        self._found.extend(violation for violation in found if violation is not None)

    def merge(self, other: "Violations") -> None:
        """What another collection has found."""
        self._found.extend(other._found)

    @property
    def found(self) -> bool:
        """Whether anything was wrong so far."""
        return bool(self._found)

    def check(self) -> None:
        """Raise ``InvalidArgument`` if anything was wrong."""
        if self._found:
            raise InvalidArgument.of_fields(tuple(self._found))

    def request_id(self, value: str) -> str:
        """The caller's key for repeats."""
        if len(value) > MAX_REQUEST_ID:
            self.add("request_id", f"is {len(value)} characters long: use a UUID, at most {MAX_REQUEST_ID}")
        elif not (value.isascii() and value.isprintable()) or " " in value:
            self.add("request_id", f"{shorten(value)} is not legal: use a UUID")
        elif is_id(value, "op"):
            self.add("request_id", "looks like the id of an operation: use a UUID")
        return value

    def object_name(self, field: str, value: str, what: str) -> str:
        """Something that exists, by its id or name."""
        if not value:
            self.add(field, f"is required: give the {what}")
        elif len(value) > MAX_OBJECT_NAME:
            self.add(field, f"is {len(value)} characters long: no {what} has more than {MAX_OBJECT_NAME}")
        return value

    def project(self, field: str, value: str) -> str:
        """A project's name, ``default`` where it is empty."""
        if value:
            self.extend(check_dns_label(field, value))
        return value or DEFAULT_PROJECT

    def resource_version(self, value: int) -> int:
        """The version that the caller has seen, or 0."""
        if value < 0:
            self.add("resource_version", f"is {value}: give the one you have seen, or 0 for any")
        return value

    def label_value(self, field: str, value: str) -> str:
        """Something that becomes the value of a label."""
        self.extend(*(FieldViolation(field, v.description) for v in check_labels(field, {"value": value})))
        return value

    def text(self, field: str, value: str, *, max_bytes: int) -> str:
        """Free text in one line."""
        size = len(value.encode())
        if size > max_bytes:
            self.add(field, f"is {size} bytes long: use at most {max_bytes}")
        elif not value.isprintable():
            self.add(field, f"{shorten(value)} has characters that cannot be printed: remove them")
        return value

    def seconds(self, field: str, value: Duration, *, at_least: float, at_most: float) -> float:
        """A span of time."""
        seconds = value.seconds + value.nanos / 1e9
        if not at_least <= seconds <= at_most:
            self.add(field, f"is {seconds:g} s: use {at_least:g} to {at_most:g} s")
        return seconds

    def whole(self, field: str, value: int, *, low: int, high: int) -> int:
        """A whole number within limits."""
        if not low <= value <= high:
            self.add(field, f"is {value}: use {low} to {high}")
        return value

    def output_only(self, message: Message, names: tuple[str, ...], prefix: str) -> None:
        """Fields that only the server sets must be empty."""
        present = {field.name for field, _ in message.ListFields()}
        for name in names:
            if name in present:
                self.add(f"{prefix}{name}", "is set by the server: leave it empty")
