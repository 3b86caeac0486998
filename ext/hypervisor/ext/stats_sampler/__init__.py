"""What instances use, sampled from the kernel's files in place, with rates and a ring of history for each.

:class:`Sampler` is described in ``_sampler_c.pyi``, its records in :class:`Record`, and which files are read in
:class:`Sources`. ``implementation`` says which one is live (``native`` or ``python``); programs log it at start.
"""

import os

from hypervisor.ext.stats_sampler._files import Sources
from hypervisor.ext.stats_sampler._record import COUNTERS, FIELDS, UNLIMITED, Record

__all__ = [
    "COUNTERS",
    "FIELDS",
    "MAX_FILE_BYTES",
    "UNLIMITED",
    "Record",
    "Sampler",
    "Sources",
    "implementation",
]

if os.environ.get("HYPERVISOR_EXT_PURE") != "1":
    from hypervisor.ext.stats_sampler._sampler_c import MAX_FILE_BYTES, Sampler

    implementation = "native"
else:
    from hypervisor.ext.stats_sampler._sampler_py import MAX_FILE_BYTES
    from hypervisor.ext.stats_sampler._sampler_py import Sampler as Sampler  # type: ignore[assignment]

    implementation = "python"
