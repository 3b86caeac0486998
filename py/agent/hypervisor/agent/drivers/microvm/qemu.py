"""QEMU as a VMM of microVMs: q35 with direct kernel boot, by KVM where that runs guests, else by TCG.

See :mod:`.vmm` for the contract, :mod:`.qemu_command` for the machine, :mod:`.qemu_monitor` for the control socket and
:mod:`.qemu_log` for how a run ended. QEMU's machine type ``microvm`` is not used: it hands its virtio devices to the
guest by a way (``virtio_mmio.device=`` on the command line, or ACPI's generic event device) that kernels of
distributions leave out or do not boot with.

States: one qcow2 file each, into which QEMU's ``snapshot-save`` writes memory and devices. The file is opened by the
agent and handed over, because QEMU may run as a user who cannot reach it. The disk is the driver's to copy.
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import MappingProxyType

from hypervisor.agent.drivers.microvm.files import open_own
from hypervisor.agent.drivers.microvm.qemu_command import (
    TRANSLATED_MIB,
    VHOST_VSOCK,
    Accelerator,
    build_command,
)
from hypervisor.agent.drivers.microvm.qemu_kernel import kernel_problem
from hypervisor.agent.drivers.microvm.qemu_log import explain_end
from hypervisor.agent.drivers.microvm.qemu_monitor import Monitor, disk_full, open_monitor
from hypervisor.agent.drivers.microvm.vmm import KERNEL, LOG, End, Launch, Machine, Run, SavedState, VmmPhase
from hypervisor.core.clock import Clock
from hypervisor.core.errors import (
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    Unavailable,
    Unimplemented,
)
from hypervisor.core.machines import SnapshotKind, VmmChoice

__all__ = ["QemuVmm"]

_KVM = Path("/dev/kvm")
_SOCKET = "qmp.sock"
_STATE = "state.qcow2"
_TAG = "state"
_NODE = "state"
_FILE_NODE = "state-file"
_LOADED = "loaded"
"""An object of QEMU that does nothing: it is there in a machine whose state was loaded and not yet let run."""
_LISTENS_WITHIN_S = 30.0
_VERSION_S = 10.0
_OVERHEAD_MIB = 96
"""A process without its guest's memory had 45 to 65 MiB, half of it mapped files."""
_ROOM_BYTES = 1 << 20
_LOG_TAIL_BYTES = 64 << 10
_STATE_S = 60.0
_STATE_S_PER_MIB = 0.05
"""A state takes this long at most, with 20 MiB a second for memory."""
_LACKS = MappingProxyType(
    {
        "snapshot-diff": "QEMU writes all of a guest's memory each time: take a full snapshot, or use Firecracker"
    }
)


class QemuVmm:
    """QEMU with one accelerator; see :class:`.vmm.Vmm`. ``program`` without '/' is looked for in PATH."""

    def __init__(self, program: Path, accelerator: Accelerator, *, clock: Clock) -> None:
        self._program = program
        self._accelerator = accelerator
        self._clock = clock

    @property
    def key(self) -> str:
        """``qemu-kvm`` or ``qemu-tcg``."""
        return f"qemu-{self._accelerator}"

    @property
    def choice(self) -> VmmChoice:
        """``qemu``, whatever the accelerator."""
        return VmmChoice.QEMU

    @property
    def lacks(self) -> Mapping[str, str]:
        """Incremental states."""
        return _LACKS

    @property
    def overhead_mib(self) -> int:
        """Devices and firmware, and with TCG the translated code."""
        return _OVERHEAD_MIB + (2 * TRANSLATED_MIB if self._accelerator is Accelerator.TCG else 0)

    async def version(self) -> str:
        """``qemu 7.2.22 (tcg)``."""
        program = self._found()
        if self._accelerator is Accelerator.KVM and not os.access(_KVM, os.R_OK | os.W_OK):
            raise _unavailable(
                f"{_KVM} cannot be opened: load the kvm module, or use QEMU without it (slower)"
            )
        try:
            process = await asyncio.create_subprocess_exec(
                program,
                "--version",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError as exc:
            raise _unavailable(f"{program} cannot be run: {exc.strerror}") from exc
        try:
            async with asyncio.timeout(_VERSION_S):
                output, _ = await process.communicate()
        except TimeoutError as exc:
            raise _unavailable(f"{program} --version has not ended in {_VERSION_S:g} s") from exc
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        words = output.decode(errors="replace").split()
        # "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"
        if process.returncode != 0 or words[:3] != ["QEMU", "emulator", "version"] or len(words) < 4:
            raise _unavailable(f"{program} --version does not answer as QEMU does")
        return f"qemu {words[3]} ({self._accelerator})"

    def root(self, directory: Path) -> Path:
        """Where kernel, RAM disk and disk are."""
        return directory / "root"

    def check(self, machine: Machine) -> None:
        """Refuse what only Firecracker has, vsock where the node's kernel has none, and a kernel it cannot boot."""
        options = machine.options
        wrong = []
        if options.metadata:
            wrong.append(
                FieldViolation(
                    "spec.microvm.metadata",
                    "needs Firecracker, and this microVM runs in QEMU: remove it, or ask for spec.microvm.vmm "
                    "firecracker on a node that has it",
                )
            )
        if options.network_limit is not None:
            wrong.append(
                FieldViolation(
                    "spec.microvm.network_limit",
                    "needs Firecracker, and this microVM runs in QEMU: remove it, or limit the bridge on the node",
                )
            )
        if options.vsock and not VHOST_VSOCK.exists():
            wrong.append(
                FieldViolation(
                    "spec.microvm.vsock",
                    f"needs {VHOST_VSOCK} for QEMU, which this node has not: remove it, or load vhost_vsock there",
                )
            )
        if wrong:
            raise InvalidArgument.of_fields(tuple(wrong))
        fd = open_own(self.root(machine.directory) / KERNEL)
        try:
            problem = kernel_problem(fd)
        finally:
            os.close(fd)
        if problem:
            raise InvalidArgument.of_field(
                "spec.kernel_path", f"QEMU cannot boot it: {problem}", reason="IMAGE_INVALID"
            )

    async def launch(self, machine: Machine) -> Launch:
        """QEMU, stopped and waiting for QMP."""
        program = self._found()
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise _unavailable("setpriv is not there: apt-get install util-linux")
        qmp = _socket(machine)
        qmp.unlink(missing_ok=True)
        command = build_command(
            machine, program=Path(program), setpriv=Path(setpriv), accelerator=self._accelerator, qmp=qmp
        )
        return Launch(argv=command, env={"PATH": os.defpath, "LC_ALL": "C"})

    async def boot(self, machine: Machine, run: Run, state: SavedState | None = None) -> None:
        """Let it run once it listens, after loading ``state`` where there is one."""
        async with self._monitor(machine, within_s=_LISTENS_WITHIN_S) as monitor:
            if monitor.pid != run.pid:
                raise Unavailable(
                    f"at the control socket of {machine.instance_id} another process listens ({monitor.pid}, not "
                    f"{run.pid}): stop it, and start the instance again",
                    reason="VMM_UNREACHABLE",
                    metadata={"instance_id": machine.instance_id},
                )
            if state is not None:
                await self._load(monitor, machine, state)
                if state.paused:
                    await monitor.execute("object-add", {"qom-type": "throttle-group", "id": _LOADED})
                    return
            await monitor.execute("cont")

    async def phase(self, machine: Machine) -> VmmPhase:
        """By ``query-status``; what has ended but is still there (a panic) counts as paused until the process goes."""
        async with self._monitor(machine) as monitor:
            status = (await monitor.execute("query-status"))["status"]
            if status == "running":
                return VmmPhase.RUNNING
            if status == "prelaunch" and not await self._was_loaded(monitor):
                return VmmPhase.STARTING
            return VmmPhase.PAUSED

    @staticmethod
    async def _was_loaded(monitor: Monitor) -> bool:
        objects = await monitor.execute("qom-list", {"path": "/objects"})
        return any(entry["name"] == _LOADED for entry in objects)

    async def ask_to_stop(self, machine: Machine) -> bool:
        """Press the power button; a guest without ACPI, or a paused one, does not notice."""
        async with self._monitor(machine) as monitor:
            await monitor.execute("system_powerdown")
        return True

    async def pause(self, machine: Machine) -> None:
        """``stop``."""
        async with self._monitor(machine) as monitor:
            await monitor.execute("stop")

    async def resume(self, machine: Machine) -> None:
        """``cont``."""
        async with self._monitor(machine) as monitor:
            await monitor.execute("cont")
            await monitor.attempt("object-del", {"id": _LOADED})

    async def save(self, machine: Machine, directory: Path, *, kind: SnapshotKind) -> None:
        """Memory and devices into one file."""
        if kind is not SnapshotKind.FULL:
            raise Unimplemented(
                f"snapshots of kind {kind} are not possible: {_LACKS['snapshot-diff']}",
                reason="CAPABILITY_MISSING",
                metadata={"vmm": self.key, "verb": "snapshot-diff"},
            )
        path = directory / _STATE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            async with self._monitor(machine) as monitor, _state_file(monitor, fd, machine):
                timeout_s = _state_timeout_s(machine)
                options = {"driver": "qcow2", "file": _FILE_NODE, "size": 1 << 20}
                await monitor.run_job("blockdev-create", "format", {"options": options}, timeout_s=timeout_s)
                await _add_state_node(monitor)
                await monitor.run_job("snapshot-save", "save", _snapshot(), timeout_s=timeout_s)
        except BaseException as exc:
            full = _is_full(fd)
            # QEMU may hold it open until the guest runs again: what it takes of the disk goes now.
            os.ftruncate(fd, 0)
            path.unlink(missing_ok=True)
            if full and isinstance(exc, FailedPrecondition):
                raise disk_full("snapshot-save", exc.metadata.get("cause", exc.message)) from exc
            raise
        finally:
            os.close(fd)

    async def _load(self, monitor: Monitor, machine: Machine, state: SavedState) -> None:
        path = state.directory / _STATE
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise FailedPrecondition(
                f"the saved state {path} cannot be opened ({exc.strerror}): start the instance without it",
                reason="STATE_LOST",
                metadata={"path": str(path)},
            ) from exc
        try:
            async with _state_file(monitor, fd, machine):
                await _add_state_node(monitor)
                timeout_s = _state_timeout_s(machine)
                await monitor.run_job("snapshot-load", "load", _snapshot(), timeout_s=timeout_s)
        finally:
            os.close(fd)

    def end_of(self, machine: Machine, exit_code: int | None) -> End:
        """By the exit code and the log's end."""
        return explain_end(_tail(self.root(machine.directory) / LOG), exit_code)

    def remove(self, machine: Machine) -> None:
        """Nothing of it is anywhere else."""

    def _monitor(self, machine: Machine, *, within_s: float = 0.0) -> AbstractAsyncContextManager[Monitor]:
        return open_monitor(_socket(machine), clock=self._clock, within_s=within_s)

    def _found(self) -> str:
        found = shutil.which(self._program)
        if found is None:
            raise _unavailable(
                f"{self._program} is not there: apt-get install qemu-system-x86, or set microvm.qemu in the agent's "
                "configuration"
            )
        return found


@asynccontextmanager
async def _state_file(monitor: Monitor, fd: int, machine: Machine) -> AsyncIterator[None]:
    """The open file as QEMU's node :data:`_FILE_NODE`; afterwards QEMU has let go of it."""
    timeout_s = _state_timeout_s(machine)
    # What an earlier conversation that was broken off may have left.
    for job in ("format", "save", "load"):
        await monitor.finish_job(job, timeout_s=timeout_s)
    await _forget_nodes(monitor)
    name, number = await monitor.pass_file(fd)
    try:
        await monitor.execute("blockdev-add", {"driver": "file", "node-name": _FILE_NODE, "filename": name})
        yield
    finally:
        with contextlib.suppress(Unavailable):
            await _forget_nodes(monitor)
            await monitor.attempt("remove-fd", {"fdset-id": number})


async def _forget_nodes(monitor: Monitor) -> None:
    for node in (_NODE, _FILE_NODE):
        await monitor.attempt("blockdev-del", {"node-name": node})


async def _add_state_node(monitor: Monitor) -> None:
    await monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": _NODE, "file": _FILE_NODE})


def _snapshot() -> dict[str, object]:
    # The machine's own disk is no part of it: QEMU wants at least one, and gets the file itself.
    return {"tag": _TAG, "vmstate": _NODE, "devices": [_NODE]}


def _socket(machine: Machine) -> Path:
    return machine.run_dir / _SOCKET


def _state_timeout_s(machine: Machine) -> float:
    return _STATE_S + _STATE_S_PER_MIB * machine.memory_mib


def _is_full(fd: int) -> bool:
    """Whether the file system has no room: QEMU calls it an input/output error when memory does not fit."""
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize < _ROOM_BYTES


def _tail(path: Path) -> str:
    try:
        fd = open_own(path)
    except OSError:
        return ""
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES)).decode(errors="replace")
    finally:
        os.close(fd)


def _unavailable(problem: str) -> Unavailable:
    return Unavailable(f"QEMU cannot run microVMs here: {problem}", reason="DRIVER_UNAVAILABLE")
