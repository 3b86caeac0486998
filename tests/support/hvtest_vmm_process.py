"""A VMM's process without the microVM driver: started as the contract of ``Vmm`` says, for tests of a VMM alone."""

import asyncio
import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from hvtest_guests import KERNEL_ARGS, linux_guest
from hypervisor.agent.drivers.microvm.vmm import INITRD, KERNEL, LOG, Card, Machine, Run, SavedState, Vmm
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions

__all__ = ["VmmProcess"]


class VmmProcess:
    """One machine with the Linux guest, and the runs of it. ``async with`` ends and removes it."""

    def __init__(
        self,
        vmm: Vmm,
        *,
        kernel_args: str = "",
        disk_bytes: int = 0,
        cards: tuple[Card, ...] = (),
        options: MicrovmOptions | None = None,
        uid: int = 0,
        memory_mib: int = 160,
        directory: Path | None = None,
    ) -> None:
        self.vmm = vmm
        self.directory = directory or Path(tempfile.mkdtemp(prefix="hv-vmm-", dir="/tmp"))
        self.machine = Machine(
            instance_id=new_id("i"),
            directory=self.directory,
            run_dir=self.directory / "run",
            vcpus=1,
            memory_mib=memory_mib,
            kernel_args=f"{KERNEL_ARGS} {kernel_args}".strip(),
            initrd=True,
            disk=bool(disk_bytes),
            cards=cards,
            options=options or MicrovmOptions(),
            uid=uid,
        )
        guest = linux_guest()
        root = vmm.root(self.directory)
        for path in (root, self.machine.run_dir):
            path.mkdir(exist_ok=True)
        shutil.copyfile(guest.kernel, root / KERNEL)
        shutil.copyfile(guest.initrd, root / INITRD)
        if disk_bytes:
            (root / "disk.raw").touch()
            os.truncate(root / "disk.raw", disk_bytes)
        self.process: asyncio.subprocess.Process | None = None
        self._in = self._out = -1
        self.seen = b""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
        self._close()
        shutil.rmtree(self.directory)

    @property
    def log(self) -> str:
        """What the VMM itself has said."""
        return (self.vmm.root(self.directory) / LOG).read_text(errors="replace")

    @property
    def run(self) -> Run:
        """The present process."""
        assert self.process is not None
        return Run(self.process.pid, 0, "")

    async def spawn(self) -> None:
        """A process with FIFOs as standard input and output, as the driver makes one."""
        self._close()
        self.seen = b""
        launch = await self.vmm.launch(self.machine)
        fifos = [self.directory / name for name in ("in", "out")]
        for path in fifos:
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        # Both ends each: neither the guest's end nor ours is ever the last.
        self._in, self._out = (os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for path in fifos)
        child_in, child_out = (os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in fifos)
        log = os.open(
            self.vmm.root(self.directory) / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        try:
            self.process = await asyncio.create_subprocess_exec(
                *launch.argv,
                stdin=child_in,
                stdout=child_out,
                stderr=log,
                env=dict(launch.env),
                cwd=self.vmm.root(self.directory),
                start_new_session=True,
                pass_fds=launch.keep,
            )
        finally:
            for fd in (child_in, child_out, log, *launch.keep, *launch.close):
                os.close(fd)

    async def start(self, state: SavedState | None = None) -> None:
        """Spawn and boot."""
        await self.spawn()
        await self.vmm.boot(self.machine, self.run, state)

    async def until_printed(self, text: bytes, *, timeout_s: float = 60.0) -> bytes:
        """What the guest has printed up to and with ``text``, since this was called last."""
        try:
            async with asyncio.timeout(timeout_s):
                while text not in self.seen:
                    try:
                        self.seen += os.read(self._out, 65536)
                    except BlockingIOError:
                        await asyncio.sleep(0.01)
        except TimeoutError:
            log = self.log
            raise AssertionError(
                f"{text!r} was not printed in {timeout_s} s: {self.seen!r}; log: {log}"
            ) from None
        head, _, self.seen = self.seen.partition(text)
        return head + text

    async def until_ready(self) -> None:
        """The guest has booted and shows its prompt."""
        await self.until_printed(b"READY")
        await self.until_printed(b"# ")

    def type(self, line: str) -> None:
        """A line for the guest's shell."""
        os.write(self._in, line.encode() + b"\n")

    async def answer(self, command: str) -> str:
        """What the guest's shell prints for a command."""
        # Only the output has the numbers: what was typed comes back too, broken where the line is full.
        self.type(f"echo BEGIN-$((40+1)); {command}; echo END-$((40+2))")
        await self.until_printed(b"BEGIN-41\r\n")
        output = await self.until_printed(b"END-42\r\n")
        await self.until_printed(b"# ")
        return output.removesuffix(b"END-42\r\n").decode().replace("\r\n", "\n").strip()

    async def ended(self, *, timeout_s: float = 30.0) -> int:
        """Its exit code as a shell tells it, once it has ended."""
        assert self.process is not None
        async with asyncio.timeout(timeout_s):
            code = await self.process.wait()
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        """End it now."""
        if self.process is not None and self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGKILL)
            await self.process.wait()

    def _close(self) -> None:
        for fd in (self._in, self._out):
            if fd >= 0:
                os.close(fd)
        self._in = self._out = -1
