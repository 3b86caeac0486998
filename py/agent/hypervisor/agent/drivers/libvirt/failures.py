"""libvirt's errors as those of the platform. Pure but for libvirt's own names of its error codes."""

import libvirt

from hypervisor.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    HypervisorError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from hypervisor.core.names import shorten

__all__ = ["connection_is_lost", "domain_not_ours", "instance_not_found", "is_missing", "translated"]

_LOST = frozenset({libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_AUTH_FAILED})
_REMOTE = frozenset({libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE})
_MISSING = frozenset({libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT})


def connection_is_lost(error: libvirt.libvirtError) -> bool:
    """Whether the connection is of no more use after this error."""
    if error.get_error_code() in _LOST:
        return True
    text = error.get_error_message() or ""
    return error.get_error_domain() in _REMOTE or "client socket is closed" in text or "keepalive" in text


def is_missing(error: libvirt.libvirtError) -> bool:
    """Whether it says that there is no such domain or snapshot."""
    return error.get_error_code() in _MISSING


def instance_not_found(instance_id: str, uri: str) -> NotFound:
    """libvirt has no such instance (``INSTANCE_NOT_FOUND``)."""
    return NotFound(
        f"libvirt at {uri} has no instance {instance_id}",
        reason="INSTANCE_NOT_FOUND",
        metadata={"instance_id": instance_id},
    )


def domain_not_ours(instance_id: str) -> AlreadyExists:
    """libvirt has a domain of this name that another agent, or somebody else, has made (``DOMAIN_NOT_OURS``)."""
    return AlreadyExists(
        f"libvirt has a domain {instance_id} that is not this agent's: remove it where it belongs, or with virsh "
        "undefine",
        reason="DOMAIN_NOT_OURS",
        metadata={"instance_id": instance_id},
    )


def translated(error: libvirt.libvirtError, *, what: str, uri: str, instance_id: str = "") -> HypervisorError:
    """The error to raise in its place; ``what`` was to be done (``start instance i-1``)."""
    code = error.get_error_code()
    text = shorten((error.get_error_message() or "no reason was given").strip(), 400)
    metadata = {"uri": uri} | ({"instance_id": instance_id} if instance_id else {})
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return instance_not_found(instance_id, uri)
    if code == libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
        return NotFound(
            f"instance {instance_id} has no such snapshot: {text}",
            reason="SNAPSHOT_NOT_FOUND",
            metadata=metadata,
        )
    if connection_is_lost(error):
        return Unavailable(
            f"libvirt at {uri} cannot be reached, to {what}: {text}: check that libvirtd runs",
            reason="DRIVER_UNAVAILABLE",
            metadata=metadata,
        )
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return Unavailable(
            f"libvirt could not {what}, it was busy with the same instance: {text}",
            reason="DRIVER_BUSY",
            metadata=metadata,
            retry_after_s=1.0,
        )
    if "No space left on device" in text or code == libvirt.VIR_ERR_NO_MEMORY:
        full = "DISK_FULL" if "space" in text else "NO_MEMORY"
        return ResourceExhausted(f"libvirt could not {what}: {text}", reason=full, metadata=metadata)
    if "Cannot allocate memory" in text or "cannot set up guest memory" in text:
        return ResourceExhausted(
            f"libvirt could not {what}, the node has not enough memory: {text}",
            reason="NO_MEMORY",
            metadata=metadata,
        )
    if code in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_UNSUPPORTED):
        return Unimplemented(
            f"libvirt here cannot {what}: {text}", reason="CAPABILITY_MISSING", metadata=metadata
        )
    return FailedPrecondition(f"libvirt could not {what}: {text}", reason="VM_REFUSED", metadata=metadata)
