"""The small Linux guest that tests of real virtual machines boot: ``hypervisor-ctl dev guest`` makes it.

Boot it with :data:`KERNEL_ARGS`; it prints READY and gives a shell on its first serial line. See
hypervisor.ctl.guest_image for what can be chosen by words of the kernel's command line.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from hypervisor.ctl.guest_image import Guest, build_guest, find_kernel, modules_of

__all__ = ["KERNEL_ARGS", "linux_guest"]

KERNEL_ARGS = "console=ttyS0 quiet panic=-1"
_BUSYBOX = Path(os.environ.get("HYPERVISOR_TEST_BUSYBOX", "/bin/busybox"))


@functools.cache
def linux_guest() -> Guest:
    """Kernel, packed and not, and initial RAM disk, made once in a test process; skips the test where Debian's parts
    are lacking."""
    kernel = find_kernel()
    if kernel is None:
        pytest.skip("no kernel in /boot for a guest: apt-get install linux-image-cloud-amd64")
    if not _BUSYBOX.exists():
        pytest.skip(f"no {_BUSYBOX} for a guest: apt-get install busybox-static")
    directory = Path(tempfile.mkdtemp(prefix="hv-guest-", dir=os.environ.get("TEST_TMPDIR")))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    # Whoever runs the guest may be another user than the test.
    directory.chmod(0o755)
    return build_guest(directory, kernel=kernel, modules=modules_of(kernel), busybox=_BUSYBOX, vmlinux=True)
