"""A user: creates, starts, stops and deletes instances of his own, repeats what was not answered, and knows what he was
told. What he is told later must agree with it."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvsim.loop import Process
from hvsim.network import Broken, Network, TooLate
from hvsim.trace import Trace
from hypervisor.core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    HypervisorError,
    NotFound,
    Unavailable,
)
from hypervisor.v1 import compute_pb2, instance_pb2, operation_pb2

__all__ = ["Client", "ClientPlan"]

_CALL_S = 15.0
_TRIES = 40
_STALE_S = 20.0
"""A read that contradicts what this user was told is repeated for so long: another server may be behind."""
_LATE_S = 150.0
"""So long a call that was given up may lie in a server that is stopped or cut off."""


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """How many names a user has, and how long he waits between calls, on average."""

    names: int = 3
    pause_s: float = 2.0


class _Known:
    """What the user knows of one name: whether there is an instance of it (None: he cannot tell)."""

    def __init__(self) -> None:
        self.exists: bool | None = False
        self.instance_id = ""
        self.unsure_until = 0.0
        """Until then a call that was given up may still take effect."""


class Client:
    """See the module's docstring. ``accepted``: instances that were created for him, by name, until he deletes them."""

    def __init__(
        self,
        process: Process,
        *,
        network: Network,
        servers: tuple[str, ...],
        rng: random.Random,
        trace: Trace,
        fail: Callable[[str], None],
        plan: ClientPlan,
        create: Callable[[random.Random, str], instance_pb2.Instance],
    ) -> None:
        self._process = process
        self._network = network
        self._servers = servers
        self._rng = rng
        self._trace = trace
        self._fail = fail
        self._plan = plan
        self._create = create
        self._server = rng.randrange(len(servers))
        self._requests = 0
        self.stopping = False
        self.done = False
        self.known = {f"{process.name}-{n}": _Known() for n in range(plan.names)}
        self.answered = 0
        self.mutations = 0
        process.start(self._run())

    async def _run(self) -> None:
        while not self.stopping:
            await asyncio.sleep(self._rng.expovariate(1 / self._plan.pause_s))
            if not self.stopping:
                await self._act()
        self.done = True

    async def _act(self) -> None:
        name = self._rng.choice(sorted(self.known))
        known = self.known[name]
        if known.exists is False:
            await self._create_one(name, known)
            return
        roll = self._rng.random()
        if roll < 0.35:
            await self._delete(name, known)
        elif roll < 0.55:
            await self._look(name, known)
        else:
            verb = self._rng.choice(("Start", "Stop", "Restart"))
            await self._change(name, known, verb)

    # --- what he does

    async def _create_one(self, name: str, known: _Known) -> None:
        request = compute_pb2.CreateInstanceRequest(
            request_id=self._request_id(), instance=self._create(self._rng, name)
        )
        outcome = await self._mutate("CreateInstance", request, known)
        if isinstance(outcome, operation_pb2.Operation):
            known.exists, known.instance_id = True, outcome.object_id
        elif isinstance(outcome, AlreadyExists):
            if known.exists is False and self._is_sure(known):
                self._fail(f"{name} is said to be taken, and this user has none: {outcome}")
        elif outcome is None or "operation_id" in outcome.metadata:
            # It may have been accepted, and then have failed: what is left of it goes when its node answers.
            known.exists = None

    async def _delete(self, name: str, known: _Known) -> None:
        request = compute_pb2.DeleteInstanceRequest(request_id=self._request_id(), instance=name, force=True)
        outcome = await self._mutate("DeleteInstance", request, known)
        if isinstance(outcome, operation_pb2.Operation):
            known.exists, known.instance_id = False, ""
        elif isinstance(outcome, NotFound):
            self._absent(name, known, outcome)
        elif outcome is None or "operation_id" in outcome.metadata:
            known.exists = None

    async def _change(self, name: str, known: _Known, verb: str) -> None:
        kind: Any = getattr(compute_pb2, f"{verb}InstanceRequest")
        outcome = await self._mutate(
            f"{verb}Instance", kind(request_id=self._request_id(), instance=name), known
        )
        if isinstance(outcome, NotFound) and outcome.reason == "INSTANCE_NOT_FOUND":
            if "operation_id" not in outcome.metadata:
                self._absent(name, known, outcome)
        elif isinstance(outcome, operation_pb2.Operation) and known.exists is False:
            self._fail(f"{verb} of {name}, which was deleted, succeeded")

    async def _look(self, name: str, known: _Known) -> None:
        request = compute_pb2.GetInstanceRequest(instance=name)
        try:
            answer = instance_pb2.Instance.FromString(await self._call("GetInstance", request))
        except NotFound as exc:
            # Reads may be behind; this one is asked again for a while.
            await self._insist_it_is_there(name, known, exc)
        except (HypervisorError, Broken, TooLate):
            self._next_server()
        else:
            if known.instance_id and answer.id != known.instance_id:
                self._trace.add(f"read of {name} is behind: {answer.id}")

    async def _insist_it_is_there(self, name: str, known: _Known, first: NotFound) -> None:
        if not known.exists:
            return
        until = asyncio.get_running_loop().time() + _STALE_S
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(1.0)
            try:
                await self._call("GetInstance", compute_pb2.GetInstanceRequest(instance=name))
            except NotFound:
                continue
            except (HypervisorError, Broken, TooLate):
                self._next_server()
                until += 1.0
            else:
                return
        self._absent(name, known, first)

    def _absent(self, name: str, known: _Known, error: NotFound) -> None:
        if known.exists and self._is_sure(known):
            self._fail(f"{name} ({known.instance_id}) was created for this user and is not there: {error}")
        known.exists, known.instance_id = False, ""

    # --- how he calls

    async def _mutate(
        self, method: str, request: Any, known: _Known
    ) -> "operation_pb2.Operation | HypervisorError | None":
        """The operation, the error it ended with, or None where he has given up without an answer."""
        self.mutations += 1
        self._trace.add(f"asks {method} {request.request_id}")
        unsure = False
        for _ in range(_TRIES):
            try:
                answer: operation_pb2.Operation = await self._call(method, request)
            except (Broken, TooLate):
                unsure = True
                self._next_server()
                await asyncio.sleep(self._rng.uniform(0.1, 1.0))
            except HypervisorError as exc:
                begun = "operation_id" in exc.metadata and exc.reason != "CONCURRENT_OPERATION"
                if isinstance(exc, Unavailable | DeadlineExceeded) and not begun:
                    unsure = True
                    self._next_server()
                    await asyncio.sleep(max(exc.retry_after_s or 0.0, self._rng.uniform(0.1, 1.0)))
                    continue
                self._trace.add(f"told {method} {request.request_id} {exc.reason}")
                self.answered += 1
                if unsure and not begun:
                    self._remember_unsure(known)
                return exc
            else:
                self._trace.add(f"told {method} {request.request_id} ok {answer.object_id[-6:]}")
                self.answered += 1
                if answer.request_id != request.request_id:
                    self._fail(
                        f"{method} {request.request_id} was answered with the operation of {answer.request_id}"
                    )
                return answer
        self._remember_unsure(known)
        self._trace.add(f"gave up {method} {request.request_id}")
        return None

    def _remember_unsure(self, known: _Known) -> None:
        known.unsure_until = asyncio.get_running_loop().time() + _LATE_S

    def _is_sure(self, known: _Known) -> bool:
        return asyncio.get_running_loop().time() >= known.unsure_until

    async def _call(self, method: str, request: Any) -> Any:
        return await self._network.call(
            self._process,
            self._servers[self._server],
            f"{self._process.name}/{method}",
            request,
            timeout_s=_CALL_S,
        )

    def _next_server(self) -> None:
        self._server = (self._server + 1) % len(self._servers)

    def _request_id(self) -> str:
        self._requests += 1
        bits = self._rng.getrandbits(128)
        text = f"{bits:032x}"
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}"
