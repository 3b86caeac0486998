"""The Driver contract and all powers, kept by the microVM driver with QEMU, by KVM, and a Linux guest."""

from collections.abc import Iterator

import pytest

from hvtest_driver_powers import PausingContract, SnapshottingContract, SuspendingContract, UpdatingContract
from hvtest_machine_contract import MachineDriverContract
from hvtest_qemu_microvms import QemuBench
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator


class TestQemuByKvm(
    MachineDriverContract, PausingContract, SuspendingContract, SnapshottingContract, UpdatingContract
):
    @pytest.fixture
    def bench(self) -> Iterator[QemuBench]:
        with QemuBench(accelerator=Accelerator.KVM) as bench:
            yield bench
