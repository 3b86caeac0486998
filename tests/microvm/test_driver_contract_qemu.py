"""The Driver contract and all powers, kept by the microVM driver with the real QEMU and a Linux guest."""

from collections.abc import Iterator

import pytest

from hvtest_driver_powers import PausingContract, SnapshottingContract, SuspendingContract, UpdatingContract
from hvtest_machine_contract import MachineDriverContract
from hvtest_qemu_microvms import QemuBench, lacking

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


class TestQemu(
    MachineDriverContract, PausingContract, SuspendingContract, SnapshottingContract, UpdatingContract
):
    @pytest.fixture
    def bench(self) -> Iterator[QemuBench]:
        with QemuBench() as bench:
            yield bench
