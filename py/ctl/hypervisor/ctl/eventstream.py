"""The cluster's events as one endless stream, across lost connections, silent ones and forgotten history."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.core.errors import HypervisorError, OutOfRange, Unavailable
from hypervisor.ctl.output import note
from hypervisor.ctl.session import Deadline, Session, translated, was_never_sent
from hypervisor.v1.cluster_pb2 import Event, WatchEventsRequest

if TYPE_CHECKING:
    import grpc

__all__ = ["EventStream", "Follow", "Relist"]

_BEST_EFFORT_S = 120.0
_SILENCE_S = 35.0
"""The server sends PROGRESS after about 10 s in which nothing happened: three of them missed is a dead connection."""


class Relist:
    """Stands in the stream where history is missing: what was shown before may be out of date."""


@dataclass(frozen=True, slots=True)
class Follow:
    """What to follow: kinds of objects, one object, one project."""

    kinds: tuple[str, ...] = ()
    object_id: str = ""
    project: str = ""


class EventStream:
    """Iterate it. A lost connection is made again for two minutes, then its error is raised.

    ``position`` is the last revision that was seen in full. Where the server has forgotten what came after it, a
    :class:`Relist` is given and the position is 0, the present: a caller that lists sets it to the revision of its new
    list before it takes the next event, and misses nothing.

    A server that cannot be connected to at first is an error at once, unless it was ``heard_from`` just before.
    """

    def __init__(
        self,
        session: Session,
        follow: Follow,
        *,
        after_revision: int,
        send_initial: bool = False,
        heard_from: bool = False,
        silence_s: float = _SILENCE_S,
    ) -> None:
        self.position = after_revision
        self._session = session
        self._follow = follow
        self._initial = send_initial
        self._heard_from = heard_from
        self._silence_s = silence_s
        self._attempt = 0

    def __iter__(self) -> "Iterator[Event | Relist]":
        patience = Deadline(_BEST_EFFORT_S)
        passed_over = 0
        while True:
            server = self._session.server
            try:
                yield from self._one_connection()
                error: HypervisorError = Unavailable("it ended the stream", retry_after_s=0.2)
            except OutOfRange:
                self.position = 0
                yield Relist()
                continue
            except Unavailable as exc:
                if not self._heard_from and was_never_sent(exc):
                    passed_over += 1
                    if passed_over >= self._session.servers:
                        raise
                    self._session.advance(server)
                    continue
                error = exc
            self._attempt += 1
            if self._attempt == 1:
                patience = Deadline(_BEST_EFFORT_S)
                note(f"Lost the server ({error}); connecting again...")
            if not self._session.pause(min(self._attempt, 4), error, patience):
                raise error

    def _one_connection(self) -> Iterator[Event]:
        request = WatchEventsRequest(
            after_revision=self.position,
            kinds=self._follow.kinds,
            object_id=self._follow.object_id,
            project=self._follow.project,
            send_initial=self._initial,
        )
        call = self._session.cluster.WatchEvents(request, metadata=self._session.metadata)
        with _SilenceGuard(call, self._silence_s) as guard:
            try:
                with translated(self._session.server):
                    for event in call:
                        guard.heard()
                        self._note_progress(event)
                        yield event
                        # However long the caller took, that was not the server's silence.
                        guard.heard()
            except HypervisorError as exc:
                if guard.ended_it:
                    raise Unavailable(f"it said nothing for {self._silence_s:g} s") from exc
                raise

    def _note_progress(self, event: Event) -> None:
        self._heard_from = True
        if self._attempt:
            note("Connected again.")
            self._attempt = 0
        if event.type != Event.TYPE_SNAPSHOT:
            self._initial = False
        if event.last_of_revision or event.type in (Event.TYPE_PROGRESS, Event.TYPE_SYNCED):
            self.position = max(self.position, event.revision)


class _SilenceGuard:
    """Cancels a call that has said nothing for too long; on leaving, cancels it anyhow."""

    def __init__(self, call: "grpc.Call", silence_s: float) -> None:
        self._call = call
        self._silence_s = silence_s
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="silence-guard", daemon=True)
        self.ended_it = False

    def __enter__(self) -> "_SilenceGuard":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._call.cancel()
        self._thread.join()

    def heard(self) -> None:
        """Note a sign of life."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._last + self._silence_s - time.monotonic())):
            if time.monotonic() - self._last >= self._silence_s:
                self.ended_it = True
                self._call.cancel()
                return
