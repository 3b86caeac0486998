"""What ends a command other than well: exit codes, and errors as a person or a script reads them.

Exit codes are part of the interface (docs/guide/cli.md): scripts tell "not there" from "refused" by them.
"""

import json
from collections.abc import Mapping
from typing import Final

from hypervisor.core import errors

__all__ = ["EXIT_CODES", "FAILURE", "INTERRUPTED", "NOT_FOUND", "OK", "REFUSED", "USAGE", "advice", "as_json"]
__all__ += ["as_text", "exit_code"]

OK: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
REFUSED: Final = 4
INTERRUPTED: Final = 130

EXIT_CODES: Mapping[int, str] = {
    OK: "Done as asked.",
    FAILURE: "Failed: the server cannot be reached, time ran out, an operation failed, or whatever is not listed "
    "below.",
    USAGE: "Wrong usage: an unknown option, a malformed value, or a request the server calls INVALID_ARGUMENT.",
    NOT_FOUND: "Not found: the object, or a part of the request (image, node, project), does not exist.",
    REFUSED: "Refused: it exists already, is in a state that forbids it, was changed meanwhile, does not fit, or is "
    "not permitted (ALREADY_EXISTS, FAILED_PRECONDITION, ABORTED, RESOURCE_EXHAUSTED, PERMISSION_DENIED).",
    INTERRUPTED: "Interrupted from the keyboard. An operation that was under way goes on.",
}
"""What each code means."""

_CODES: tuple[tuple[type[errors.HypervisorError], int], ...] = (
    (errors.InvalidArgument, USAGE),
    (errors.NotFound, NOT_FOUND),
    (errors.AlreadyExists, REFUSED),
    (errors.FailedPrecondition, REFUSED),
    (errors.Conflict, REFUSED),
    (errors.ResourceExhausted, REFUSED),
    (errors.PermissionDenied, REFUSED),
)

_ADVICE: Mapping[str, str] = {
    "PEER_UNREACHABLE": "start one with 'hypervisor-ctl dev up', or choose another with --server or "
    "'hypervisor-ctl context use NAME'",
    "INSTANCE_NOT_FOUND": "'hypervisor-ctl instance list' shows what there is",
    "NODE_NOT_FOUND": "'hypervisor-ctl node list' shows the nodes",
    "OPERATION_NOT_FOUND": "'hypervisor-ctl operation list' shows those still kept",
    "INSTANCE_NAME_TAKEN": "choose another name, or delete that instance first",
    "INSTANCE_RUNNING": "stop it first, or delete it with --force",
    "ALREADY_RUNNING": "nothing to do; 'instance restart' starts it anew",
    "NOT_RUNNING": "start it with 'hypervisor-ctl instance start NAME'",
    "NOT_PAUSED": "'hypervisor-ctl instance get NAME' shows how it is",
    "SNAPSHOT_NOT_FOUND": "'hypervisor-ctl instance snapshot list NAME' shows what is kept",
    "CONCURRENT_OPERATION": "wait for that operation ('hypervisor-ctl operation wait ID') and try again",
    "RESOURCE_VERSION_MISMATCH": "it changed meanwhile: look at it again and repeat the command",
    "NO_NODE_FITS": "ask for less, free something ('hypervisor-ctl node list -o wide' shows what is free), or add "
    "a node",
    "NODE_FULL": "ask for less, or make a larger one on another node",
    "UPDATE_REFUSED": "stop it, update it, and start it again",
    "NODE_HAS_INSTANCES": "delete its instances first ('hypervisor-ctl instance list --node NODE')",
    "NODE_READY": "stop its agent first",
    "UNAUTHENTICATED": "give a token: --token, HYPERVISOR_TOKEN or 'hypervisor-ctl context set NAME --token-file "
    "FILE'",
}


def exit_code(error: errors.HypervisorError) -> int:
    """The exit code an error ends the program with."""
    return next((code for cls, code in _CODES if isinstance(error, cls)), FAILURE)


def advice(error: errors.HypervisorError) -> str:
    """What to do next, or an empty string where the message says it all."""
    if isinstance(error, errors.DeadlineExceeded) and "operation_id" in error.metadata:
        return f"it goes on: hypervisor-ctl operation wait {error.metadata['operation_id']}"
    return _ADVICE.get(error.reason, "")


def _node_reasons(error: errors.HypervisorError) -> list[tuple[str, str]]:
    """Why no node was chosen, node by node: the metadata keys ``node.<hostname>``."""
    if error.reason != "NO_NODE_FITS" or error.violations:  # the violations say the same
        return []
    prefix = "node."
    return sorted((k.removeprefix(prefix), v) for k, v in error.metadata.items() if k.startswith(prefix))


def as_text(error: errors.HypervisorError) -> str:
    """The error for a person: the sentence, one line for each wrong field or node, the reason, what to do next."""
    violations = error.violations
    message = error.message
    if isinstance(error, errors.InvalidArgument) and len(violations) > 1:
        message = f"the request has {len(violations)} problems"  # its message says all of them in one line
    lines = [f"Error: {message} ({error.reason})"]
    if len(violations) > 1 or not isinstance(error, errors.InvalidArgument):
        lines += [f"  {v.field}: {v.description}" if v.field else f"  {v.description}" for v in violations]
    lines += [f"  {node}: {reason}" for node, reason in _node_reasons(error)]
    operation = error.metadata.get("operation_id")
    if operation:
        lines.append(f"  operation: {operation}")
    if error.retry_after_s is not None and error.reason != "PEER_UNREACHABLE":
        lines.append(f"  it may succeed in {error.retry_after_s:g} s")
    hint = advice(error)
    if hint:
        lines.append(f"Next: {hint}")
    return "\n".join(lines)


def as_json(error: errors.HypervisorError) -> str:
    """The error for a script: one JSON object on one line."""
    document: dict[str, object] = {
        "code": type(error).__name__,
        "exit_code": exit_code(error),
        "message": error.message,
        "metadata": dict(error.metadata),
        "reason": error.reason,
        "violations": [{"description": v.description, "field": v.field} for v in error.violations],
    }
    if error.retry_after_s is not None:
        document["retry_after_s"] = error.retry_after_s
    hint = advice(error)
    if hint:
        document["next"] = hint
    return json.dumps({"error": document}, ensure_ascii=False, sort_keys=True)
