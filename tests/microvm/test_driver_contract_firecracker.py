"""The Driver contract and all powers, kept by the microVM driver with the real Firecracker, jailed and not."""

from collections.abc import Iterator

import pytest

from hvtest_driver_powers import PausingContract, SnapshottingContract, SuspendingContract, UpdatingContract
from hvtest_machine_contract import MachineDriverContract
from hvtest_microvms import FirecrackerBench, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class TestFirecrackerInItsJail(
    MachineDriverContract, PausingContract, SuspendingContract, SnapshottingContract, UpdatingContract
):
    @pytest.fixture
    def bench(self) -> Iterator[FirecrackerBench]:
        with FirecrackerBench() as bench:
            yield bench


class TestFirecrackerWithoutAJail(
    MachineDriverContract, PausingContract, SuspendingContract, SnapshottingContract, UpdatingContract
):
    @pytest.fixture
    def bench(self) -> Iterator[FirecrackerBench]:
        with FirecrackerBench(jail=False) as bench:
            yield bench
