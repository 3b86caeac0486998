"""Work that a cancellation must not tear apart."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["uninterrupted"]

T = TypeVar("T")


async def uninterrupted(work: "Coroutine[Any, Any, T] | asyncio.Task[T]") -> T:
    """The result of ``work``, which is finished even when the caller is cancelled meanwhile; then CancelledError.

    A call to a runtime that is cancelled half way may or may not have had its effect, and work in a thread goes on
    anyway, with descriptors that its caller closes. Where that matters the work is let finish (its own deadline bounds
    it), and what it did is known.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
