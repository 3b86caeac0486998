"""The Driver contract and all powers, kept by the microVM driver with Firecracker, jailed, and a Linux guest."""

from collections.abc import Iterator

import pytest

from hvtest_driver_powers import PausingContract, SnapshottingContract, SuspendingContract, UpdatingContract
from hvtest_linux_microvms import LinuxFirecrackerBench
from hvtest_machine_contract import MachineDriverContract


class TestLinuxUnderFirecracker(
    MachineDriverContract, PausingContract, SuspendingContract, SnapshottingContract, UpdatingContract
):
    @pytest.fixture
    def bench(self) -> Iterator[LinuxFirecrackerBench]:
        with LinuxFirecrackerBench() as bench:
            yield bench
