"""Changing how much processor and memory a container may use, while it runs or for its next start."""

import json
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from hypervisor.agent.drivers.containerd.observing import TaskPhase
from hypervisor.agent.drivers.containerd.runtime import Runtime
from hypervisor.agent.drivers.containerd.tracking import Live, Tracker
from hypervisor.agent.drivers.cpu_quota import apply_cpu_limit, cpu_limit
from hypervisor.core.errors import FailedPrecondition, HypervisorError, Unavailable
from hypervisor.core.model import Observation, Sizes
from hypervisor.core.resources import MIB

__all__ = ["update_limits"]


async def update_limits(runtime: Runtime, tracker: Tracker, live: Live, sizes: Sizes) -> Observation:
    """Limit the container of ``live``, whose lock is held: first what runs, which may refuse, then what is recorded.

    FailedPrecondition (``UPDATE_REFUSED``): nothing has changed.
    """
    instance_id = live.record.instance_id
    container = await tracker.container(instance_id)
    spec = json.loads(container.spec.value)
    resources = _with(spec["linux"]["resources"], sizes)
    state = await runtime.task_state(instance_id)
    if state is not None and state.phase in (TaskPhase.RUNNING, TaskPhase.PAUSED):
        live.cgroup = live.cgroup or tracker.locate(state.pid)
        await _limit_now(runtime, live, {"memory": resources["memory"], "cpu": resources["cpu"]}, sizes)
    spec["linux"]["resources"] = resources
    record = replace(live.record, cpu_millis=sizes.cpu_millis)
    await runtime.update_container(record, spec=spec)
    live.record = record
    return await tracker.observe(record, state)


def _with(resources: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The resources of a runtime specification with the sizes. Where swap is limited, it is limited with the memory."""
    memory_bytes = sizes.memory_mb * MIB
    memory = dict.fromkeys(resources["memory"], memory_bytes)
    cpu = {**resources["cpu"], "shares": cpu_limit(sizes.cpu_millis).shares}
    return {**resources, "memory": memory, "cpu": cpu}


async def _limit_now(runtime: Runtime, live: Live, resources: Mapping[str, Any], sizes: Sizes) -> None:
    instance_id = live.record.instance_id
    try:
        await runtime.update_task(instance_id, resources)
    except Unavailable:
        raise
    except HypervisorError as exc:
        raise FailedPrecondition(
            f"instance {instance_id} cannot be limited to {sizes.memory_mb} MiB while it runs ({exc.message}): stop it "
            "first, or ask for more",
            reason="UPDATE_REFUSED",
            metadata={"instance_id": instance_id},
        ) from exc
    if live.cgroup is not None:
        apply_cpu_limit(live.cgroup, cpu_limit(sizes.cpu_millis))
