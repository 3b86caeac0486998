"""The serial line of a virtual machine over two FIFOs that QEMU opens itself (a ``pipe`` of libvirt's).

libvirt's own way to a console allows one viewer, knows no descriptor and is gone with libvirtd. FIFOs outlive agent and
libvirtd: QEMU holds both ends of each (see :mod:`..fifo_console`), so whoever comes back reads on where it was left.
"""

from pathlib import Path

from hypervisor.agent.drivers.fifo_console import ConsoleFifos

__all__ = ["PipeFifos"]


class PipeFifos(ConsoleFifos):
    """FIFOs under the names that QEMU gives them, reachable for QEMU where it runs as a user of its own."""

    def __init__(self, root: Path, *, buffer_bytes: int) -> None:
        super().__init__(root, buffer_bytes=buffer_bytes)
        self._base = root

    def source(self, instance_id: str) -> Path:
        """The path for the domain's definition: QEMU opens ``<path>.in`` and ``<path>.out``."""
        return self._base / instance_id / "serial"

    def paths(self, instance_id: str) -> tuple[Path, Path]:
        """Input and output FIFO."""
        source = self.source(instance_id)
        return source.with_suffix(".in"), source.with_suffix(".out")

    def make(self, instance_id: str) -> tuple[Path, Path]:
        """Fresh FIFOs for a start; libvirt gives them to QEMU's user."""
        made = super().make(instance_id)
        for directory in (self._base, self._base / instance_id):
            # Who may go through may not look: names are ids, and the FIFOs are their owner's alone.
            directory.chmod(0o711)
        return made
