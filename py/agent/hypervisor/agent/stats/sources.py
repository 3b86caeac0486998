"""Where the figures of an instance come from: files of the kernel, or a runtime that is asked for many at once."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from hypervisor.ext.stats_sampler import Sources

__all__ = ["StatsFeed", "StatsSource"]


class StatsFeed(Protocol):
    """A runtime that knows the figures of its instances: libvirt's bulk statistics, or the fake driver.

    All instances of a driver that are read this way have the same feed, so that they are read by one call.
    """

    async def read(self, instance_ids: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
        """Figures by instance id, each by the names of ``stats_sampler.COUNTERS``, whole numbers of 0 to 2^63-1.

        One that does not run (any more) is left out; a figure that is not known is left out. Raises HypervisorError
        when the runtime cannot be asked.
        """
        ...


StatsSource = Sources | StatsFeed
"""Files that the sampler opens (see ``stats_sampler.Sources``), or a feed."""
