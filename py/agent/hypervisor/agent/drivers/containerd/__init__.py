"""Containers on this node, run by containerd through its gRPC API.

Modules, from the outside in: :mod:`.driver` (the ``Driver`` contract: order of calls, one instance at a time),
:mod:`.events` (exits and OOM kills as they happen), :mod:`.images` with :mod:`.archive`, :mod:`.content`, :mod:`.oci`
and :mod:`.accounts` (what is run), :mod:`.runtime_spec` with :mod:`.seccomp` (how it is run), :mod:`.console` (its
terminal), :mod:`.labels` and :mod:`.observing` (what is known of it), :mod:`.runtime` and :mod:`.client` (the calls).

What belongs to an instance all bears its id: the container record (made first and deleted last, so that whatever was
left half done is found by it), the snapshot, the task, the control group ``/<namespace>/<id>`` and the directory of its
FIFOs. docs/decisions/0006-containerd-api.md says why.
"""

from hypervisor.agent.drivers.containerd.config import ContainerdConfig
from hypervisor.agent.drivers.containerd.driver import ContainerdDriver

__all__ = ["ContainerdConfig", "ContainerdDriver"]
