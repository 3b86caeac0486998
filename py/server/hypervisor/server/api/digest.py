"""What identifies a request: how a repeat of a call is told from another call that reuses its request_id."""

import hashlib

from google.protobuf.message import Message

__all__ = ["payload_digest"]

_IGNORED = ("request_id", "no_wait")


def payload_digest(request: Message) -> str:
    """SHA-256 (hexadecimal) of the message's name and content without ``request_id`` and ``no_wait``.

    The same for equal messages, whatever the order in which maps were filled and on whichever server: deterministic
    encoding sorts maps, and unknown fields count as content.
    """
    kept = type(request)()
    kept.CopyFrom(request)
    for name in _IGNORED:
        if name in request.DESCRIPTOR.fields_by_name:
            kept.ClearField(name)
    content = kept.SerializeToString(deterministic=True)
    return hashlib.sha256(request.DESCRIPTOR.full_name.encode() + b"\0" + content).hexdigest()
