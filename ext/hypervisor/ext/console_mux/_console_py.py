"""What the readable multiplexer keeps of a console and of a viewer. Plain records; the mux moves them."""

import os
import socket

from hypervisor.ext.console_mux._decoder_py import FrameDecoder
from hypervisor.ext.console_mux._input_py import InputQueue
from hypervisor.ext.console_mux._log_py import Log
from hypervisor.ext.console_mux._ring_py import Ring
from hypervisor.ext.console_mux._viewer_py import ViewerState

__all__ = ["Console", "Viewer"]


class Viewer:
    """A viewer and its socket."""

    def __init__(
        self, viewer_id: int, console: "Console", sock: socket.socket, state: ViewerState, *, framed: bool
    ) -> None:
        self.id = viewer_id
        self.console = console
        self.sock = sock
        self.fd = sock.fileno()
        self.state = state
        self.decoder = FrameDecoder(from_viewer=True) if framed else None
        self.read_only = False
        self.may_resize = True
        self.blocked = False
        """The socket took less than it was offered: wait until it is writable."""
        self.paused = False
        """Nothing is read from the socket, as there is no room for what may come."""
        self.deaf = False
        """It will send nothing more."""
        self.wants_room = False
        """It was refused input and hears when there is room."""
        self.mask = 0


class Console:
    """A console: its ring, its guest's descriptors, its viewers, its queue of input, its log."""

    def __init__(self, console_id: int, ring: Ring) -> None:
        self.id = console_id
        self.ring = ring
        self.log = Log(console_id, ring)
        self.input = InputQueue()
        self.viewers: dict[int, Viewer] = {}
        self.read_fd = -1
        self.write_fd = -1
        self.read_mask = 0
        self.write_mask = 0
        self.is_terminal = False
        self.wants_room = False
        self.flushed = ring.end
        """Position up to which viewers were offered the output."""
        self.flushed_at = 0.0
        self.flush_due: float | None = None
        self.skipped = 0
        self.input_bytes = 0

    def close_guest(self) -> None:
        """Close the guest's descriptors and forget the input it did not take."""
        for fd in {self.read_fd, self.write_fd} - {-1}:
            os.close(fd)
        self.read_fd = self.write_fd = -1
        self.read_mask = self.write_mask = 0
        self.is_terminal = False
        self.input.data.clear()
