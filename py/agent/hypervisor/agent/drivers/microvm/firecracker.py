"""Firecracker as a VMM: command line, configuration over its API, states, and what its end means."""

import asyncio
import contextlib
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec
import structlog

from hypervisor.agent.drivers.microvm import firecracker_config as configuration
from hypervisor.agent.drivers.microvm.files import copy_into, open_own, overlay, remove_tree
from hypervisor.agent.drivers.microvm.firecracker_api import FirecrackerApi
from hypervisor.agent.drivers.microvm.firecracker_end import end_of
from hypervisor.agent.drivers.microvm.jailer import Jailer, clear, empty_network, jail_root
from hypervisor.agent.drivers.microvm.vmm import LOG, End, Launch, Machine, Run, SavedState, VmmPhase
from hypervisor.core.clock import Clock
from hypervisor.core.errors import Unavailable
from hypervisor.core.machines import SnapshotKind, VmmChoice

__all__ = ["FirecrackerVmm"]

_KEY: Final = "firecracker"
_SOCKET = "api.sock"
_STATE, _MEMORY = "vm", "memory"
_LOADING, _SAVING = "loading", "saving"
_SAVE_TIMEOUT_S = 600.0
_VERSION = re.compile(r"Firecracker v(\S+)")
_PHASES = {"Not started": VmmPhase.STARTING, "Running": VmmPhase.RUNNING, "Paused": VmmPhase.PAUSED}
_METRICS_BYTES = 1 << 20

_log = structlog.get_logger(__name__)


class FirecrackerVmm:
    """Implements ``Vmm``. ``jailer`` None: it runs as the agent does. Programs without '/' are looked for in PATH.
    ``request_timeout_s``: of each request of its API but those that move a guest's memory."""

    key = _KEY
    choice = VmmChoice.FIRECRACKER
    lacks: Mapping[str, str] = MappingProxyType({})
    overhead_mib = 48
    """Its own memory, beside the guest's, with room for what it keeps of files."""

    def __init__(
        self,
        program: Path,
        *,
        jailer: Path | None,
        clock: Clock,
        kvm: Path = Path("/dev/kvm"),
        request_timeout_s: float = 10.0,
    ) -> None:
        self._program = program
        self._jailer = jailer
        self._clock = clock
        self._kvm = kvm
        self._request_timeout_s = request_timeout_s
        self._version: tuple[str, str] = ("", "")

    async def version(self) -> str:
        """``firecracker 1.12.1``."""
        program = self._resolved()
        if self._jailer is not None:
            _find(self._jailer, "its jailer", "microvm.jailer")
        if not os.access(self._kvm, os.R_OK | os.W_OK):
            raise Unavailable(
                f"Firecracker needs {self._kvm}, which "
                + ("the agent may not open" if self._kvm.exists() else "this node does not have")
                + ": turn on virtualization, load the module kvm, and let the agent use it",
                reason="DRIVER_UNAVAILABLE",
            )
        known_for = f"{program} {program.stat().st_mtime_ns}"
        if self._version[0] != known_for:
            self._version = (known_for, await _ask_version(program))
        return f"{_KEY} {self._version[1]}"

    def root(self, directory: Path) -> Path:
        """In the jail, which is there without a jailer too."""
        return jail_root(directory, self._program)

    def check(self, machine: Machine) -> None:
        """See ``Vmm``."""
        configuration.check(machine, self.root(machine.directory))

    async def launch(self, machine: Machine) -> Launch:
        """See ``Vmm``."""
        program = self._resolved()
        root = await asyncio.to_thread(self._tidy, machine, program)
        words = ["--api-sock", _SOCKET, "--log-path", LOG, "--level", "Info"]

        async def listens() -> None:
            async with self._api(machine) as api:
                await api.ready()

        if self._jailer is None or not machine.uid:
            return Launch(argv=(str(program), "--id", machine.instance_id, *words), listens=listens)
        assert root == self.root(machine.directory)
        jailer = Jailer(_find(self._jailer, "its jailer", "microvm.jailer"))
        # One with cards has its taps in the node's network.
        network = None if machine.cards else await empty_network()
        command = jailer.command(
            program,
            instance_id=machine.instance_id,
            directory=machine.directory,
            uid=machine.uid,
            # The jailer closes what it inherits, and opens this while it may still do so.
            network=None if network is None else f"/proc/{os.getpid()}/fd/{network}",
        )
        return Launch(argv=(*command, *words), close=() if network is None else (network,), listens=listens)

    async def boot(self, machine: Machine, run: Run, state: SavedState | None = None) -> None:
        """See ``Vmm``."""
        root = self.root(machine.directory)
        if state is not None:
            await asyncio.to_thread(_bring, state, root, machine.uid)
        async with self._api(machine) as api:
            await api.ready()
            for path, body in configuration.requests(machine, fresh=state is None):
                await api.put(path, body)
            if state is None:
                try:
                    await api.put("/actions", {"action_type": "InstanceStart"})
                except Unavailable as exc:
                    # A guest can end, and its VMM with it, before the answer is here: that is for the driver to see.
                    _log.info(
                        "microvm_ended_with_its_start", instance_id=machine.instance_id, error=exc.message
                    )
            else:
                await self._load(api, machine, state)
        if state is not None:
            # Firecracker has opened what it needs.
            await asyncio.to_thread(remove_tree, root / _LOADING)

    async def _load(self, api: FirecrackerApi, machine: Machine, state: SavedState) -> None:
        await api.put(
            "/snapshot/load",
            {
                "snapshot_path": f"{_LOADING}/{_STATE}",
                "mem_backend": {"backend_type": "File", "backend_path": f"{_LOADING}/{_MEMORY}"},
                "enable_diff_snapshots": machine.track_changes,
                "resume_vm": False,
            },
            timeout_s=_SAVE_TIMEOUT_S,
        )
        metadata = configuration.metadata(machine)
        if metadata is not None:
            # What the metadata service tells is no part of a state.
            await api.put("/mmds", metadata)
        if not state.paused:
            await api.patch("/vm", {"state": "Resumed"})

    async def phase(self, machine: Machine) -> VmmPhase:
        """See ``Vmm``."""
        async with self._api(machine) as api:
            answer = await api.get("/")
        state = answer.get("state") if isinstance(answer, dict) else None
        if state not in _PHASES:
            raise Unavailable(f"Firecracker tells no state: {answer!r}", reason="VMM_UNREACHABLE")
        return _PHASES[state]

    async def ask_to_stop(self, machine: Machine) -> bool:
        """Ctrl-Alt-Del."""
        async with self._api(machine) as api:
            await api.put("/actions", {"action_type": "SendCtrlAltDel"})
        return True

    async def pause(self, machine: Machine) -> None:
        """See ``Vmm``."""
        async with self._api(machine) as api:
            await api.patch("/vm", {"state": "Paused"})

    async def resume(self, machine: Machine) -> None:
        """See ``Vmm``."""
        async with self._api(machine) as api:
            await api.patch("/vm", {"state": "Resumed"})

    async def save(self, machine: Machine, directory: Path, *, kind: SnapshotKind) -> None:
        """See ``Vmm``. The memory of a DIFF has holes where nothing changed."""
        saving = self.root(machine.directory) / _SAVING
        remove_tree(saving)
        try:
            saving.mkdir(mode=0o700)
            if machine.uid:
                os.chown(saving, machine.uid, machine.uid)
            async with self._api(machine) as api:
                await api.put(
                    "/snapshot/create",
                    {
                        "snapshot_type": "Diff" if kind is SnapshotKind.DIFF else "Full",
                        "snapshot_path": f"{_SAVING}/{_STATE}",
                        "mem_file_path": f"{_SAVING}/{_MEMORY}",
                    },
                    timeout_s=_SAVE_TIMEOUT_S,
                )
            for name in (_STATE, _MEMORY):
                (saving / name).rename(directory / name)
        finally:
            await asyncio.to_thread(remove_tree, saving)

    def end_of(self, machine: Machine, exit_code: int | None) -> End:
        """See ``Vmm``."""
        return end_of(self.root(machine.directory) / LOG, exit_code)

    def remove(self, machine: Machine) -> None:
        """Nothing is outside of the instance's directory."""

    # Beyond ``Vmm``.

    async def metrics(self, machine: Machine) -> Mapping[str, Any]:
        """Firecracker's own counters since they were told last, by device; see its metrics.rs."""
        fd = open_own(self.root(machine.directory) / configuration.METRICS, kind=stat.S_IFIFO)
        try:
            _drain(fd)
            async with self._api(machine) as api:
                await api.put("/actions", {"action_type": "FlushMetrics"})
            text = _drain(fd)
        finally:
            os.close(fd)
        for line in reversed(text.splitlines()):
            with contextlib.suppress(msgspec.MsgspecError):
                found = msgspec.json.decode(line)
                if isinstance(found, dict):
                    return found
        raise Unavailable("Firecracker has told no metrics", reason="VMM_UNREACHABLE")

    async def configuration(self, machine: Machine) -> Mapping[str, Any]:
        """The machine as Firecracker has it; see FullVmConfiguration of its API."""
        async with self._api(machine) as api:
            shown: Mapping[str, Any] = await api.get("/vm/config")
        return shown

    async def metadata(self, machine: Machine) -> Any:
        """What the guest's metadata service tells."""
        async with self._api(machine) as api:
            return await api.get("/mmds")

    def _api(self, machine: Machine) -> FirecrackerApi:
        return FirecrackerApi(
            self.root(machine.directory) / _SOCKET, clock=self._clock, timeout_s=self._request_timeout_s
        )

    def _resolved(self) -> Path:
        return Path(os.path.realpath(_find(self._program, "it", "microvm.firecracker")))

    def _tidy(self, machine: Machine, program: Path) -> Path:
        """What an earlier run has left would be in the way of the next."""
        root = clear(self.root(machine.directory), machine.directory, program)
        for name in (_SOCKET, configuration.VSOCK, configuration.METRICS):
            (root / name).unlink(missing_ok=True)
        for name in (_LOADING, _SAVING):
            remove_tree(root / name)
        # A FIFO: what nobody asks for is lost, where a file would grow for ever.
        os.mkfifo(root / configuration.METRICS, 0o600)
        if machine.uid:
            os.chown(root / configuration.METRICS, machine.uid, machine.uid, follow_symlinks=False)
        return root


def _bring(state: SavedState, root: Path, uid: int) -> None:
    """The files of a state into the root, under the names that ``boot`` loads."""
    loading = root / _LOADING
    remove_tree(loading)
    loading.mkdir(mode=0o700)
    if uid:
        os.chown(loading, uid, uid)
    os.link(state.directory / _STATE, loading / _STATE, follow_symlinks=False)
    if state.kind is SnapshotKind.FULL:
        # Read where it is: Firecracker keeps what the guest changes to itself.
        os.link(state.directory / _MEMORY, loading / _MEMORY, follow_symlinks=False)
        return
    parts = [*state.bases, state.directory]
    with contextlib.ExitStack() as stack:
        fds = []
        for part in parts:
            fds.append(open_own(part / _MEMORY))
            stack.callback(os.close, fds[-1])
        copy_into(fds[0], loading / _MEMORY, uid=uid)
        merged = open_own(loading / _MEMORY, flags=os.O_RDWR)
        stack.callback(os.close, merged)
        for fd in fds[1:]:
            overlay(fd, merged)


def _drain(fd: int) -> bytes:
    text = b""
    while len(text) < _METRICS_BYTES:
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            break
        if not part:
            break
        text += part
    return text


def _find(program: Path, what: str, key: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise Unavailable(
            f"Firecracker cannot run here: {what} is not found as {program}: install it, or set {key}",
            reason="DRIVER_UNAVAILABLE",
            metadata={"program": str(program)},
        )
    return os.path.abspath(found)


async def _ask_version(program: Path) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            str(program), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(10.0):
            output, _ = await process.communicate()
    except (OSError, TimeoutError) as exc:
        raise Unavailable(
            f"{program} cannot be run: {exc or 'it did not end'}", reason="DRIVER_UNAVAILABLE"
        ) from exc
    found = _VERSION.search(output.decode("utf-8", errors="replace"))
    if found is None:
        raise Unavailable(
            f"{program} --version does not say that it is Firecracker", reason="DRIVER_UNAVAILABLE"
        )
    return found.group(1)
