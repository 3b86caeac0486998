"""Amounts of processor, memory and disk, in integers, so that sums are exact."""

import msgspec

__all__ = ["GIB", "MIB", "ZERO", "Resources", "cores", "millicores"]

MIB = 1 << 20
GIB = 1 << 30


def millicores(cpu_cores: float) -> int:
    """Whole thousandths of a core, rounded to the nearest."""
    return round(cpu_cores * 1000)


def cores(cpu_millis: int) -> float:
    """Cores of a number of thousandths."""
    return cpu_millis / 1000


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """An amount of each resource: thousandths of a core, bytes of memory, bytes of disk."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def __add__(self, other: "Resources") -> "Resources":
        return Resources(
            cpu_millis=self.cpu_millis + other.cpu_millis,
            memory_bytes=self.memory_bytes + other.memory_bytes,
            disk_bytes=self.disk_bytes + other.disk_bytes,
        )

    def __sub__(self, other: "Resources") -> "Resources":
        return Resources(
            cpu_millis=self.cpu_millis - other.cpu_millis,
            memory_bytes=self.memory_bytes - other.memory_bytes,
            disk_bytes=self.disk_bytes - other.disk_bytes,
        )

    def at_least(self, other: "Resources") -> "Resources":
        """The larger of each amount."""
        return Resources(
            cpu_millis=max(self.cpu_millis, other.cpu_millis),
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
            disk_bytes=max(self.disk_bytes, other.disk_bytes),
        )

    def fits_in(self, free: "Resources") -> bool:
        """Whether every amount is at most that of ``free``."""
        return (
            self.cpu_millis <= free.cpu_millis
            and self.memory_bytes <= free.memory_bytes
            and self.disk_bytes <= free.disk_bytes
        )


ZERO = Resources()
