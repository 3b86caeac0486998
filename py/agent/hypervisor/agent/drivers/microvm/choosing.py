"""Which VMM runs an instance, and why: what the specification asks for, what is configured, or what a probe shows.

That a VMM starts proves little (on nested virtualization a guest may hang without a word), so the probe boots a kernel
and waits for the first bytes on its console. What it found is kept on disk, for this kernel of the node, this version
of the VMM and this kernel of the guest.
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from hypervisor.agent.drivers.microvm.config import MicrovmConfig
from hypervisor.agent.drivers.microvm.files import copy_into, remove_tree
from hypervisor.agent.drivers.microvm.runner import Runner
from hypervisor.agent.drivers.microvm.vmm import KERNEL, Machine, Vmm
from hypervisor.core.errors import HypervisorError, Unavailable
from hypervisor.core.ids import IdSource
from hypervisor.core.machines import VmmChoice

__all__ = ["Choice", "Chooser"]

_PROBE_MEMORY_MIB = 192
_VERSIONS_HOLD_S = 30.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A VMM, its version, and why it is that one."""

    vmm: Vmm
    version: str
    reason: str


class _Verdict(msgspec.Struct, frozen=True):
    works: bool
    reason: str


class Chooser:
    """``vmms``: in the order in which they are preferred; the last one is taken without a probe."""

    def __init__(
        self, vmms: Sequence[Vmm], config: MicrovmConfig, runner: Runner, *, new_id: IdSource
    ) -> None:
        self.vmms = tuple(vmms)
        self._config = config
        self._runner = runner
        self._new_id = new_id
        self._choosing: dict[VmmChoice, asyncio.Task[Choice]] = {}
        self._versions: tuple[str, ...] = ()
        self.usable: tuple[Vmm, ...] = ()
        """Those that answered when :meth:`versions` last asked them."""
        self._asked_at: float | None = None

    def by_key(self, key: str) -> Vmm:
        """The VMM of a record. ``Unavailable`` (``DRIVER_UNAVAILABLE``) when this version has it no more."""
        for vmm in self.vmms:
            if vmm.key == key:
                return vmm
        raise Unavailable(f"this agent does not know the VMM {key}", reason="DRIVER_UNAVAILABLE")

    async def choose(self, wanted: VmmChoice) -> Choice:
        """The VMM for an instance whose specification says ``wanted``. Waits for a probe that is under way.
        ``Unavailable`` (``DRIVER_UNAVAILABLE``) with every reason."""
        by_spec = wanted is not VmmChoice.AUTO
        wanted = wanted if by_spec else self._config.vmm
        choice = await asyncio.shield(self._begin(wanted))
        if wanted is VmmChoice.AUTO:
            return choice
        origin = "spec.microvm.vmm asks for it" if by_spec else "microvm.vmm is set to it"
        reason = f"{origin}; {choice.reason}" if choice.reason else origin
        return Choice(choice.vmm, choice.version, reason)

    def decided(self) -> Choice | HypervisorError | None:
        """What instances get that ask for nothing; None while a probe is under way, which this begins."""
        task = self._begin(self._config.vmm)
        if not task.done():
            return None
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, HypervisorError):
            return error
        raise error

    async def versions(self) -> tuple[str, ...]:
        """Of all VMMs that can run here, as it was within the last half minute: some are asked by running them."""
        now = asyncio.get_running_loop().time()
        if self._asked_at is not None and now - self._asked_at < _VERSIONS_HOLD_S:
            return self._versions
        found = []
        usable = []
        for vmm in self.vmms:
            with contextlib.suppress(HypervisorError):
                found.append(await vmm.version())
                usable.append(vmm)
        self.usable = tuple(usable)
        self._asked_at, self._versions = now, tuple(dict.fromkeys(found))
        return self._versions

    async def aclose(self) -> None:
        """End a probe."""
        for task in self._choosing.values():
            task.cancel()
        await asyncio.gather(*self._choosing.values(), return_exceptions=True)
        self._choosing.clear()

    def _begin(self, wanted: VmmChoice) -> "asyncio.Task[Choice]":
        task = self._choosing.get(wanted)
        # What failed is tried again: a program may have been installed meanwhile.
        if task is None or task.cancelled() or (task.done() and task.exception() is not None):
            task = self._choosing[wanted] = asyncio.ensure_future(self._choose(wanted))
        return task

    async def _choose(self, wanted: VmmChoice) -> Choice:
        candidates = [v for v in self.vmms if wanted in (VmmChoice.AUTO, v.choice)]
        against: list[str] = []
        usable: list[tuple[Vmm, str]] = []
        for vmm in candidates:
            try:
                usable.append((vmm, await vmm.version()))
            except HypervisorError as exc:
                against.append(exc.message)
        for position, (vmm, version) in enumerate(usable):
            if position == len(usable) - 1:
                return Choice(vmm, version, "; ".join(against))
            verdict = await self._verdict(vmm, version)
            if verdict.works:
                return Choice(vmm, version, verdict.reason)
            against.append(verdict.reason)
        raise Unavailable(
            "; ".join(against) or f"this agent knows no VMM {wanted}", reason="DRIVER_UNAVAILABLE"
        )

    async def _verdict(self, vmm: Vmm, version: str) -> _Verdict:
        kernel = self._config.kernel
        if kernel is None:
            return _Verdict(False, f"{version} is not probed, as machines.kernel names no kernel to boot")
        try:
            there = kernel.stat()
        except OSError as exc:
            return _Verdict(False, f"{version} is not probed, as {kernel} cannot be read ({exc.strerror})")
        key = f"{os.uname().release} {version} {vmm.key} {kernel} {there.st_size} {there.st_mtime_ns}"
        cache = self._config.data_dir / "probes.json"
        verdicts = _read(cache)
        verdict = verdicts.get(key)
        if verdict is None:
            verdict = await self._probe(vmm, version, kernel)
            _write(cache, {**_read(cache), key: verdict})
            _log.info("microvm_probed", vmm=vmm.key, works=verdict.works, reason=verdict.reason)
        return verdict

    async def _probe(self, vmm: Vmm, version: str, kernel: Path) -> _Verdict:
        instance_id = self._new_id("i")
        directory = self._config.data_dir / "probes" / instance_id
        uid = self._config.first_uid + self._config.uids - 1 if self._config.jail and os.geteuid() == 0 else 0
        machine = Machine(
            instance_id=instance_id,
            directory=directory,
            run_dir=self._config.run_dir / instance_id,
            vcpus=1,
            memory_mib=_PROBE_MEMORY_MIB,
            kernel_args="console=ttyS0 panic=1",
            uid=uid,
            track_changes=False,
        )
        timeout_s = self._config.probe_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._boot(vmm, machine, kernel)
        except TimeoutError:
            return _Verdict(False, f"{version} did not make {kernel} say anything within {timeout_s:g} s")
        except HypervisorError as exc:
            # Without the field, which is none of a specification's here.
            why = "; ".join(violation.description for violation in exc.violations) or exc.message
            return _Verdict(False, f"{version} does not boot {kernel}: {why}")
        except OSError as exc:
            return _Verdict(False, f"{version} could not be probed with {kernel}: {exc}")
        finally:
            self._runner.fifos.remove(instance_id)
            with contextlib.suppress(OSError):
                shutil.rmtree(machine.run_dir, ignore_errors=True)
                await asyncio.to_thread(remove_tree, directory)
        return _Verdict(True, f"{version} boots guests here, as a probe has shown")

    async def _boot(self, vmm: Vmm, machine: Machine, kernel: Path) -> None:
        root = vmm.root(machine.directory)
        fd = os.open(kernel, os.O_RDONLY | os.O_CLOEXEC)
        try:
            root.mkdir(mode=0o700, parents=True)
            await asyncio.to_thread(copy_into, fd, root / KERNEL, uid=machine.uid)
        finally:
            os.close(fd)
        if machine.uid:
            os.chown(root, machine.uid, machine.uid)
        vmm.check(machine)
        process = await self._runner.start(vmm, machine, cpu_millis=1000)
        try:
            reader, writer = self._runner.fifos.open(machine.instance_id)
            try:
                await _readable(reader)
                words = await asyncio.to_thread(os.read, reader, 1)
            finally:
                os.close(reader)
                if writer is not None:
                    os.close(writer)
            if not words:
                end = vmm.end_of(machine, process.exit_code)
                raise Unavailable(f"its guest ended without a word ({end.message})", reason="VMM_UNREACHABLE")
        finally:
            await asyncio.shield(self._runner.kill(process))
            await asyncio.shield(self._runner.tidy(machine))
            vmm.remove(machine)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _read(cache: Path) -> dict[str, _Verdict]:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=dict[str, _Verdict])
    except (OSError, msgspec.MsgspecError):
        return {}


def _write(cache: Path, verdicts: dict[str, _Verdict]) -> None:
    try:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = cache.with_name(f"{cache.name}.new")
        new.write_bytes(msgspec.json.encode(verdicts))
        new.replace(cache)
    except OSError as exc:
        _log.warning("microvm_probe_not_kept", path=str(cache), error=str(exc))
