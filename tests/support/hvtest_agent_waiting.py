"""Waiting in tests: on conditions, bounded, never for a fixed time.

``HYPERVISOR_TEST_PATIENCE`` is what every limit is multiplied by: 10 in an emulated machine.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["PATIENCE", "until", "within"]

PATIENCE = float(os.environ.get("HYPERVISOR_TEST_PATIENCE", "1"))

T = TypeVar("T")


async def until(probe: Callable[[], T | None], *, what: str, timeout_s: float = 10.0) -> T:
    """The first true result of ``probe``; AssertionError after ``timeout_s``."""
    timeout_s *= PATIENCE
    try:
        async with asyncio.timeout(timeout_s):
            while not (result := probe()):  # noqa: ASYNC110 - not every condition has an event
                await asyncio.sleep(0.005)
            return result
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


async def within(work: Awaitable[T], *, what: str, timeout_s: float = 10.0) -> T:
    """The result of ``work``; AssertionError after ``timeout_s``."""
    timeout_s *= PATIENCE
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None
