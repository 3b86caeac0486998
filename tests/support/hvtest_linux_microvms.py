"""The microVM driver over the real Firecracker with the small Linux guest, where the machine's KVM runs one.

Whether it does, a boot decides (:func:`no_linux_guest`): there are KVMs that accept a Linux guest and hang it.
"""

import asyncio
import functools
import shutil
from concurrent.futures import ThreadPoolExecutor

from hvtest_agent_waiting import PATIENCE
from hvtest_guests import linux_guest
from hvtest_microvms import FirecrackerBench, assignment, missing
from hvtest_qemu_microvms import ReadyDriver
from hypervisor.agent.drivers.driver import Driver
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions, NetworkInterface
from hypervisor.core.model import InstanceSpec

__all__ = ["LinuxFirecrackerBench", "no_linux_guest"]

_PROBE_S = 20.0 * PATIENCE
_READY = b"READY"


@functools.cache
def no_linux_guest() -> str:
    """Why no Linux guest runs under Firecracker here; empty where one has just booted to its shell. It takes 20 s at
    most where a guest hangs. Skips the test where Debian's parts of the guest are lacking."""
    if why := missing():
        return why
    # A thread of its own, as the test's event loop may be running.
    with ThreadPoolExecutor(1) as pool, LinuxFirecrackerBench() as bench:
        return pool.submit(asyncio.run, _boot(bench)).result()


async def _boot(bench: "LinuxFirecrackerBench") -> str:
    driver = bench.driver()
    made = assignment(bench.shell())
    seen = b""
    try:
        await driver.create(made)
        await driver.start(made.instance_id)
        console = await driver.attach(made.instance_id)
        try:
            async with asyncio.timeout(_PROBE_S):
                while _READY not in seen:
                    data = await console.read()
                    if not data:
                        return f"a Linux guest ended under Firecracker before it was up ({_told(seen)})"
                    seen += data
        except TimeoutError:
            return (
                f"/dev/kvm is there, but a Linux guest did not boot by it within {_PROBE_S:g} s under Firecracker "
                f"({_told(seen)})"
            )
        finally:
            await console.close()
    finally:
        await driver.delete(made.instance_id)
        await driver.aclose()
    return ""


def _told(seen: bytes) -> str:
    lines = seen.decode(errors="replace").split("\n")
    words = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"the last it said: {words[:200]}" if words else "it said nothing"


class LinuxFirecrackerBench(FirecrackerBench):
    """``FirecrackerBench`` with a Linux guest; what the base promises of its own guest's lines does not hold."""

    def __init__(self, *, jail: bool = True, bridges: tuple[str, ...] = ()) -> None:
        super().__init__(jail=jail, bridges=bridges)
        guest = linux_guest()
        assert guest.vmlinux is not None
        self.kernel, self.initrd = self.images / "vmlinux", self.images / "initrd.img"
        shutil.copyfile(guest.vmlinux, self.kernel)
        shutil.copyfile(guest.initrd, self.initrd)

    async def open(self) -> Driver:
        """As the contract's tests take it: what is typed before a kernel has its serial port is lost."""
        return ReadyDriver(self.config, (self.vmm(),), clock=SystemClock(), new_id=new_id)

    def driver(self) -> MicrovmDriver:
        """A driver, as an agent that starts makes one."""
        return MicrovmDriver(self.config, (self.vmm(),), clock=SystemClock(), new_id=new_id)

    def spec(
        self,
        *,
        run: str = "",
        memory_mb: int = 128,
        disk_gb: int = 0,
        options: MicrovmOptions | None = None,
        networks: tuple[NetworkInterface, ...] = (),
        arguments: str = "",
    ) -> InstanceSpec:
        """A guest that runs the command in place of its shell."""
        words = ("quiet", f'GUEST_RUN="{run}"' if run else "", arguments)
        return InstanceSpec(
            kernel_path=str(self.kernel),
            initrd_path=str(self.initrd),
            kernel_args=" ".join(word for word in words if word),
            memory_mb=memory_mb,
            disk_gb=disk_gb,
            networks=networks,
            microvm=options,
        )

    def exits(self, code: int) -> InstanceSpec:
        """A panic is told from an orderly end where it resets the machine in a way of its own: by a triple fault."""
        if not code:
            return self.spec(run="exit 0")
        return self.spec(run=f"exit {code}", arguments="GUEST_ON_ERROR=panic panic=-1 reboot=t")

    def prints(self, text: str) -> InstanceSpec:
        return self.spec(run=f"echo {text}")
