"""Whether KVM runs guests here: found out by booting one, for /dev/kvm alone proves nothing.

Nested and paravirtual KVMs exist whose guests hang or run slower than QEMU's own emulation. The probe is a boot sector
that goes through real and protected mode into 64-bit mode with paging, works with memory for a moment and then ends
QEMU with a code that nothing else gives. Where that does not happen in time, guests are emulated (TCG). The answer is
kept on disk until the kernel, QEMU or the KVM module changes.
"""

import asyncio
import contextlib
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

__all__ = ["Accelerator", "probe_kvm"]

_log = structlog.get_logger(__name__)

# cli; real mode; lgdt; protected mode; PML4, PDPT and PD with one page of 2 MiB at 0x10000; PAE; long mode by the EFER;
# paging; a million additions to 0x20000; out 0xf4, 0x2a; hlt. The tables of segments follow.
_SECTOR = bytes.fromhex(
    "fa31c08ed88ed0bc007c660f0116c07c0f20c00c010f22c066ea207c0000080066b810008ed88ec08ed0bf000001000f22df"
    "31c0b9000c0000fcf3abc7050000010003100100c7050010010003200100c70500200100830000000f20e083c8200f22e0b9"
    "800000c00f320d000100000f300f20c00d000000800f22c0ea837c00001800b940420f00ff042500000200e2f766baf400b0"
    "2aeef4ebfd0f1f4400000000000000000000ffff0000009acf00ffff00000092cf00ffff0000009aaf001f00a07c"
)
_DISK_BYTES = 1 << 20
_BOOTED = (0x2A << 1) | 1
"""The exit code that QEMU's device isa-debug-exit makes of what the sector writes."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """How guests are run: ``kind`` is libvirt's type of domain (``kvm``, or ``qemu`` for emulation)."""

    kind: str
    reason: str

    @property
    def title(self) -> str:
        """For people."""
        return {"kvm": "KVM", "qemu": "TCG"}.get(self.kind, self.kind)


class _Kept(msgspec.Struct, frozen=True):
    key: str
    works: bool
    reason: str


async def probe_kvm(emulator: Path, *, cache: Path, timeout_s: float) -> Accelerator:
    """KVM where a guest boots with it within ``timeout_s`` seconds, else emulation, with the reason."""
    key = await asyncio.to_thread(_identity, emulator)
    if not key:
        return Accelerator("qemu", "the node has no /dev/kvm: guests are emulated")
    kept = await asyncio.to_thread(_read, cache)
    if kept is None or kept.key != key:
        works, reason = await _boot(emulator, timeout_s)
        kept = _Kept(key, works, reason)
        await asyncio.to_thread(_write, cache, kept)
        _log.info("kvm_probed", works=works, reason=reason)
    return Accelerator("kvm" if kept.works else "qemu", kept.reason)


def _identity(emulator: Path) -> str:
    try:
        os.stat("/dev/kvm")
        program = os.stat(emulator)
    except OSError:
        return ""
    modules = sorted(path.name for path in Path("/sys/module").glob("kvm*"))
    return " ".join(
        [platform.release(), str(emulator), str(program.st_size), str(program.st_mtime_ns), *modules]
    )


async def _boot(emulator: Path, timeout_s: float) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory(prefix="hypervisor-kvm-") as directory:
        disk = Path(directory, "probe.raw")
        content = (_SECTOR.ljust(510, b"\0") + b"\x55\xaa").ljust(_DISK_BYTES, b"\0")
        await asyncio.to_thread(disk.write_bytes, content)
        process = await asyncio.create_subprocess_exec(
            *(str(emulator), "-machine", "q35,accel=kvm", "-cpu", "host", "-m", "32", "-nodefaults"),
            *("-no-user-config", "-no-reboot", "-display", "none", "-serial", "none", "-monitor", "none"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-drive", f"file={disk},format=raw,if=none,id=d", "-device", "ide-hd,drive=d,bootindex=0"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
        try:
            async with asyncio.timeout(timeout_s):
                _, errors = await process.communicate()
        except TimeoutError:
            return False, f"a guest did not boot with the node's KVM in {timeout_s:g} s: guests are emulated"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
    if process.returncode == _BOOTED:
        return True, "a guest booted with the node's KVM"
    lines = errors.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
    return False, f"QEMU cannot run a guest with the node's KVM ({lines[0][:200]}): guests are emulated"


def _read(cache: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(cache: Path, kept: _Kept) -> None:
    try:
        cache.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        scratch = cache.with_suffix(".new")
        scratch.write_bytes(msgspec.json.encode(kept))
        scratch.replace(cache)
    except OSError as exc:
        # The next start of the agent probes again.
        _log.warning("kvm_probe_not_kept", path=str(cache), error=str(exc))
