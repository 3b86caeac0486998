"""The Driver contract, kept by the fake driver."""

from pathlib import Path

import pytest

from hvtest_driver_contract import DriverContract
from hvtest_driver_powers import PausingContract, SnapshottingContract, SuspendingContract, UpdatingContract
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType


class FakeBench:
    """A fake runtime that lives in a directory, as a real one outlives its agents."""

    kind = InstanceType.CONTAINER

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    async def open(self) -> FakeDriver:
        return FakeDriver(FakeConfig(state_dir=self._state_dir), clock=SystemClock())

    def shell(self) -> InstanceSpec:
        return InstanceSpec(image="fake", memory_mb=64)

    def exits(self, code: int) -> InstanceSpec:
        return InstanceSpec(image="fake", memory_mb=64, command=("exit", str(code)))

    def prints(self, text: str) -> InstanceSpec:
        return InstanceSpec(image="fake", memory_mb=64, command=("echo", *text.split()))

    def missing_image(self) -> InstanceSpec:
        return InstanceSpec(image="missing", memory_mb=64)

    def invalid_image(self) -> InstanceSpec:
        return InstanceSpec(image="invalid", memory_mb=64)

    def leftovers(self) -> dict[str, list[str]]:
        left = sorted(path.name for path in self._state_dir.glob("*"))
        return {"files": left} if left else {}


class TestFakeDriver(
    DriverContract, PausingContract, SuspendingContract, SnapshottingContract, UpdatingContract
):
    @pytest.fixture
    def bench(self, tmp_path: Path) -> FakeBench:
        return FakeBench(tmp_path / "fake")
