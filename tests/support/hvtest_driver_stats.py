"""What a driver's instance uses, read once the way the agent does: through the sampler."""

import time

from hypervisor.agent.drivers.driver import Driver
from hypervisor.agent.stats.records import stats_of
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import InstanceStats
from hypervisor.ext.stats_sampler import Sampler, Sources

__all__ = ["sampled"]


async def sampled(driver: Driver, instance_id: str) -> InstanceStats:
    """One sample of the instance, of everything its source gives. Raises what the driver raises."""
    source = await driver.stats_source(instance_id)
    with Sampler(history=1) as sampler:
        now, wall = time.monotonic_ns(), time.time_ns()
        if isinstance(source, Sources):
            slot = sampler.add(source)
            sampler.sample(slot, now, wall, everything=True)
        else:
            figures = (await source.read([instance_id])).get(instance_id)
            slot = sampler.add()
            if figures is not None:
                sampler.store(slot, now, wall, figures)
        record = sampler.latest(slot)
    if record is None:
        raise FailedPrecondition(f"{instance_id} does not run", reason="NOT_RUNNING")
    return stats_of(record)
