"""The console multiplexer: any number of guests' terminals, each with a scrollback and any number of viewers.

One thread of its own serves all consoles; the owner steers it by the thread-safe calls of :class:`ConsoleMux` and
hears of it by :class:`Event`. Bytes never pass through the owner. The vocabulary:

- A *console* outlives its guest: it is a ring of the last output, positions that count every byte ever put out, and
  perhaps a log file. It has at most one *guest* at a time, a descriptor to read from and one to write to.
- A *viewer* is a connected stream socket with a cursor of its own. *Raw* viewers get the output as it is and what they
  send is typed; *framed* viewers speak the protocol of :mod:`hypervisor.ext.console_mux.frames`.
- A viewer that is overtaken by the ring is *skipped* forward and told so. It slows neither the guest nor other viewers.

``implementation`` says which one is live (``native`` or ``python``); programs log it at start.
"""

import os

from hypervisor.ext.console_mux._types import (
    COALESCE_MS,
    INPUT_QUEUE_BYTES,
    SCROLLBACK_BYTES,
    VIEWER_MEMORY_BYTES,
    Attached,
    Chunk,
    ConsoleStats,
    Event,
    EventKind,
    ViewerEnd,
    ViewerStats,
)

__all__ = [
    "COALESCE_MS",
    "INPUT_QUEUE_BYTES",
    "SCROLLBACK_BYTES",
    "VIEWER_MEMORY_BYTES",
    "Attached",
    "Chunk",
    "ConsoleMux",
    "ConsoleStats",
    "Event",
    "EventKind",
    "FrameDecoder",
    "Ring",
    "ViewerEnd",
    "ViewerStats",
    "implementation",
]

if os.environ.get("HYPERVISOR_EXT_PURE") == "1":
    from hypervisor.ext.console_mux._decoder_py import FrameDecoder
    from hypervisor.ext.console_mux._mux_py import ConsoleMux
    from hypervisor.ext.console_mux._ring_py import Ring

    implementation = "python"
else:
    from hypervisor.ext.console_mux._mux_c import ConsoleMux, FrameDecoder, Ring

    implementation = "native"
