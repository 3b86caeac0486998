"""``hypervisor-agent --simulated N``: N agents in one process, each a node of its own with the fake driver. No root."""

import asyncio
import random

from hypervisor.agent.app import run_agent
from hypervisor.agent.config import AgentSettings
from hypervisor.core.clock import Clock
from hypervisor.core.ids import IdSource

__all__ = ["SAMPLED_EVERY_S", "run_simulated", "simulated_settings"]

SAMPLED_EVERY_S = 10.0
"""A simulated node measures no more often."""


def simulated_settings(settings: AgentSettings, index: int) -> AgentSettings:
    """The settings of the ``index``-th simulated node, from 0: its own name, port and data directory."""
    first_port = settings.simulated.first_port
    name = f"{index + 1:04d}"
    return settings.model_copy(
        update={
            "node": settings.node.model_copy(update={"hostname": f"{settings.hostname()}-{name}"}),
            "agent": settings.agent.model_copy(
                update={
                    "port": first_port + index if first_port else 0,
                    "data_dir": settings.agent.data_dir / f"simulated-{name}",
                }
            ),
            # Many nodes share this process: what is made up need not be measured often, nor is there one port for all.
            "stats": settings.stats.model_copy(
                update={"interval": max(settings.stats.interval, SAMPLED_EVERY_S), "slow_interval": 600.0}
            ),
            "metrics": settings.metrics.model_copy(update={"address": ""}),
            "drivers": settings.drivers.model_copy(update={"enabled": ("fake",)}),
        }
    )


async def run_simulated(
    settings: AgentSettings,
    count: int,
    *,
    stop: asyncio.Event,
    clock: Clock,
    rng: random.Random,
    new_id: IdSource,
    version: str,
) -> None:
    """Run ``count`` agents until ``stop`` is set; the failure of one to start ends all."""
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(
                run_agent(
                    simulated_settings(settings, index),
                    stop=stop,
                    clock=clock,
                    rng=random.Random(rng.random()),
                    new_id=new_id,
                    version=version,
                    simulated=True,
                )
            )
