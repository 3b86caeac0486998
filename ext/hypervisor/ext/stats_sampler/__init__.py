"""Counters out of the kernel's control group files, read in place from descriptors that stay open.

``implementation`` says which one is live (``native`` or ``python``); programs log it at start.
"""

import os

__all__ = ["MAX_FILE_BYTES", "UNLIMITED", "implementation", "read_counters"]

if os.environ.get("HYPERVISOR_EXT_PURE") == "1":
    from hypervisor.ext.stats_sampler._parser_py import MAX_FILE_BYTES, UNLIMITED, read_counters

    implementation = "python"
else:
    from hypervisor.ext.stats_sampler._parser_c import MAX_FILE_BYTES, UNLIMITED, read_counters

    implementation = "native"
