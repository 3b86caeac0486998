"""NOT_FOUND is answered only after the view has what the store holds."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from hypervisor.core.errors import NotFound, Unavailable
from hypervisor.server.api.fresh import looking_again


class Records:
    """What is in the view, and in the store."""

    def __init__(self, *stored: str) -> None:
        self.stored = set(stored)
        self.seen: set[str] = set()
        self.calls = 0
        self.reachable = True

    async def catch_up(self) -> bool:
        if not self.reachable:
            raise Unavailable("the store is down")
        behind = self.seen != self.stored
        self.seen = set(self.stored)
        return behind

    async def get(self, request: Any, call: Any) -> bytes:
        self.calls += 1
        if request not in self.seen:
            raise NotFound(f"there is no {request}")
        return b"found"

    async def watch(self, request: Any, call: Any) -> AsyncIterator[bytes]:
        raise NotFound("a stream")
        yield b""


async def test_what_another_server_has_just_recorded_is_found() -> None:
    records = Records("a")
    handlers = looking_again({"Get": records.get}, records.catch_up)

    assert await handlers["Get"]("a", None) == b"found"  # type: ignore[arg-type, misc]
    assert records.calls == 2


async def test_what_is_not_there_is_looked_for_once_where_nothing_was_missing() -> None:
    records = Records()
    handlers = looking_again({"Get": records.get}, records.catch_up)

    with pytest.raises(NotFound, match="there is no b"):
        await handlers["Get"]("b", None)  # type: ignore[arg-type, misc]
    assert records.calls == 1


async def test_nobody_can_say_that_it_is_not_there_while_the_store_is_down() -> None:
    records = Records("a")
    records.reachable = False
    handlers = looking_again({"Get": records.get}, records.catch_up)

    with pytest.raises(Unavailable):
        await handlers["Get"]("a", None)  # type: ignore[arg-type, misc]


def test_streams_stay_as_they_are() -> None:
    records = Records()

    assert looking_again({"Watch": records.watch}, records.catch_up)["Watch"] == records.watch
