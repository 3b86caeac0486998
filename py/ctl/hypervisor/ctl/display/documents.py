"""Answers as JSON and YAML: the JSON mapping of protobuf with the field names of the .proto files.

Every field without presence is always there, so that scripts find the same keys each time; fields with presence
(``exit_code``, ``started_at``, the members of ``stats``) are absent when they are not set. As in all protobuf JSON,
64-bit integers are strings, times are RFC 3339 and enumerations are their full names.
"""

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

__all__ = ["as_document", "as_json", "as_yaml"]

_ERROR_TYPES = "type.googleapis.com/google.rpc."


def as_document(message: Message) -> dict[str, Any]:
    """The message as plain values."""
    from google.protobuf import json_format
    from google.rpc import error_details_pb2  # noqa: F401  # registers the details of Operation.error

    _drop_unknown_details(message)
    document: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document


def _drop_unknown_details(message: Message) -> None:
    """Leave out details of errors that this version has no schema for: they have no JSON form."""
    operation: Any = message
    if message.DESCRIPTOR.name == "Event":
        operation = operation.operation
    elif message.DESCRIPTOR.name != "Operation":
        return
    known = [detail for detail in operation.error.details if detail.type_url.startswith(_ERROR_TYPES)]
    if len(known) != len(operation.error.details):
        del operation.error.details[:]
        operation.error.details.extend(known)


def _documents(answer: Message | Sequence[Message]) -> Any:
    if isinstance(answer, Message):
        return as_document(answer)
    return [as_document(item) for item in answer]


def as_json(answer: Message | Sequence[Message], *, indent: int | None = 2) -> str:
    """A JSON object, or an array of them. ``indent`` None: on one line."""
    import json

    return json.dumps(_documents(answer), ensure_ascii=False, indent=indent)


def as_yaml(answer: Message | Sequence[Message]) -> str:
    """A YAML mapping, or a sequence of them."""
    import yaml

    text: str = yaml.safe_dump(
        _documents(answer), sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    return text.rstrip("\n")
