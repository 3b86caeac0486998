"""The node's drivers and how they are: polled, so that a runtime that dies or comes back is noticed by itself."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
import structlog

from hypervisor.agent.drivers.guard import GuardedDriver
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Unavailable, Unimplemented
from hypervisor.core.model import DriverInfo
from hypervisor.core.states import InstanceType

__all__ = ["DriverHealth", "OfferedDriver"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OfferedDriver:
    """A driver and the instance types this node lets it run."""

    driver: GuardedDriver
    types: tuple[InstanceType, ...]


class DriverHealth:
    """Newest ``info`` of every driver. ``missing`` are drivers that could not even be made, with the reason.

    ``changed`` is called with a driver's name after its info changed; it must not block.
    """

    def __init__(
        self, offered: Iterable[OfferedDriver], *, missing: Iterable[DriverInfo], clock: Clock, poll_s: float
    ) -> None:
        self._offered: Mapping[str, OfferedDriver] = {o.driver.name: o for o in offered}
        self._missing = tuple(missing)
        self._clock = clock
        self._poll_s = poll_s
        self._infos: dict[str, DriverInfo] = {}
        self._listeners: list[Callable[[str], None]] = []

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call ``listener`` with the driver's name after each change."""
        self._listeners.append(listener)

    @property
    def names(self) -> tuple[str, ...]:
        """Drivers that exist here, able to work or not."""
        return tuple(self._offered)

    def infos(self) -> tuple[DriverInfo, ...]:
        """Every driver as it was last, missing ones included."""
        return tuple(self._info(name) for name in self._offered) + self._missing

    def available(self, name: str) -> bool:
        """Whether it could work when last looked at."""
        return name in self._infos and self._infos[name].available

    def named(self, name: str) -> GuardedDriver:
        """The driver of an instance. Unavailable (``DRIVER_UNAVAILABLE``) when this node no longer has it."""
        offered = self._offered.get(name)
        if offered is None:
            raise Unavailable(
                f"driver {name} is not enabled on this node any more: add its type to drivers.enabled",
                reason="DRIVER_UNAVAILABLE",
                metadata={"driver": name},
            )
        return offered.driver

    async def choose(self, kind: InstanceType) -> GuardedDriver:
        """The driver that runs this type here.

        Unimplemented (``CAPABILITY_MISSING``) where there is none, Unavailable (``DRIVER_UNAVAILABLE``) where it
        cannot work now, both with the driver's reason.
        """
        for name, offered in self._offered.items():
            if kind in offered.types:
                if not self.available(name):
                    await self.check(name)
                info = self._info(name)
                if info.available:
                    return offered.driver
                raise Unavailable(
                    f"driver {name} cannot run {kind} instances now: {info.reason}",
                    reason="DRIVER_UNAVAILABLE",
                    metadata={"driver": name, "cause": info.reason},
                )
        why = next((info.reason for info in self._missing if kind in info.types), "")
        raise Unimplemented(
            f"this node runs no {kind} instances: {why or 'its type is not in drivers.enabled'}",
            reason="CAPABILITY_MISSING",
            metadata={"type": str(kind)},
        )

    def require(self, name: str, verb: str) -> None:
        """Unimplemented (``CAPABILITY_MISSING``) with the driver's reason when it lacks the verb; Unavailable
        (``DRIVER_UNAVAILABLE``) when this node no longer has the driver."""
        info = self._info(self.named(name).name)
        if not info.capabilities:
            return  # Never reached yet: the driver itself will say that it is unavailable.
        lacking = info.lacks(verb)
        if lacking is not None:
            raise Unimplemented(
                f"driver {name} cannot {verb}: {lacking.reason}",
                reason="CAPABILITY_MISSING",
                metadata={"driver": name, "verb": verb, "cause": lacking.reason},
            )

    async def check(self, name: str) -> None:
        """Ask one driver now."""
        offered = self._offered[name]
        before = self._infos.get(name)
        try:
            info = msgspec.structs.replace(await offered.driver.info(), types=offered.types)
        except HypervisorError as exc:
            info = msgspec.structs.replace(self._info(name), available=False, reason=exc.message)
        self._infos[name] = info
        if info == before:
            return
        level = _log.info if info.available else _log.warning
        level(
            "driver_changed", driver=name, available=info.available, reason=info.reason, version=info.version
        )
        for listener in self._listeners:
            listener(name)

    async def check_all(self) -> None:
        """Ask every driver now, all at once."""
        await asyncio.gather(*(self.check(name) for name in self._offered))

    async def collect(self) -> None:
        """Have each driver that works remove files that no instance uses any more. A failure is told in the log."""
        for name in self._offered:
            if not self.available(name):
                continue
            try:
                await self.named(name).collect()
            except HypervisorError as exc:
                _log.warning("driver_files_not_collected", driver=name, error=exc.message)

    async def run(self) -> None:
        """Poll for ever."""
        for info in self._missing:
            _log.info("driver_missing", driver=info.name, reason=info.reason)
        while True:
            await self.check_all()
            await self._clock.sleep(self._poll_s)

    def _info(self, name: str) -> DriverInfo:
        return self._infos.get(name) or DriverInfo(
            name=name,
            types=self._offered[name].types,
            available=False,
            reason="it has not answered since the agent started",
        )
