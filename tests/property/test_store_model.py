"""Random operations on a store against a model of a few dictionaries."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from hvtest_storage import conflicted, read_watch
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import InvalidArgument, NotFound
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import (
    ABSENT,
    Change,
    Committed,
    Compacted,
    Compare,
    Delete,
    Item,
    Operation,
    Put,
    Storage,
    WatchBatch,
)

T = TypeVar("T")

KEYS = ("/a", "/a/b", "/a/bc", "/a/c", "/ab", "/b", "/\u00e9", "/\U0001f600")
PREFIXES = ("", "/", "/a", "/a/", "/a/b", "/\u00e9", "/z")
keys = st.sampled_from(KEYS)
values = st.binary(max_size=4)


@dataclass
class Model:
    """What the store should hold: all states, one for each revision, and what changed between them."""

    states: list[dict[str, Item]] = field(default_factory=lambda: [{}])
    compacted: int = 0

    @property
    def newest(self) -> int:
        return len(self.states) - 1

    @property
    def current(self) -> dict[str, Item]:
        return self.states[-1]

    def apply(self, operations: list[Operation]) -> None:
        """Make the next state, if anything changes."""
        revision = self.newest + 1
        state = dict(self.current)
        for operation in operations:
            old = state.pop(operation.key, None)
            if isinstance(operation, Put):
                created = old.create_revision if old else revision
                state[operation.key] = Item(
                    operation.key, operation.value, created, revision, operation.lease_id
                )
        if state != self.current:
            self.states.append(state)

    def batches(self, prefix: str, after: int) -> list[WatchBatch]:
        """What a watch has to deliver."""
        batches = []
        for revision in range(after + 1, self.newest + 1):
            before, now = self.states[revision - 1], self.states[revision]
            changes = tuple(
                Change(key, revision, now.get(key), before.get(key))
                for key in KEYS
                if key.startswith(prefix) and before.get(key) != now.get(key)
            )
            if changes:
                batches.append(WatchBatch(revision, changes))
        return batches


class StoreMachine(RuleBasedStateMachine):
    """Subclass it with the backend's configuration."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model = Model()
        self.storage: Storage
        self.ended: set[str] = set()

    def config(self) -> StoreConfig:
        """The backend under test."""
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await on the machine's own loop."""
        return self.runner.run(work)

    @initialize()
    def open(self) -> None:
        self.storage = self.run(open_storage(self.config(), SystemClock()))

    def teardown(self) -> None:
        if hasattr(self, "storage"):
            self.run(self.storage.aclose())
        self.runner.close()

    @rule(target=leases)
    def grant(self) -> str:
        return self.run(self.storage.grant_lease(3600)).id

    @rule(lease=consumes(leases))
    def revoke(self, lease: str) -> None:
        self.run(self.storage.revoke_lease(lease))
        self.ended.add(lease)
        self.model.apply([Delete(k) for k, item in self.model.current.items() if item.lease_id == lease])

    @rule(
        changes=st.dictionaries(keys, st.none() | values, max_size=4),
        lease=st.none() | leases,
        compared=st.sets(keys, max_size=3),
        wrong=st.none() | st.tuples(keys, st.integers(min_value=1, max_value=3)),
    )
    def commit(
        self,
        changes: dict[str, bytes | None],
        lease: str | None,
        compared: set[str],
        wrong: tuple[str, int] | None,
    ) -> None:
        current = self.model.current
        operations: list[Operation] = [
            Delete(k) if v is None else Put(k, v, lease or "") for k, v in changes.items()
        ]
        compares = [Compare(k, current[k].mod_revision if k in current else ABSENT) for k in compared]
        if wrong is not None:
            key, off = wrong
            compares.append(Compare(key, (current[key].mod_revision if key in current else ABSENT) + off))
            outcome = conflicted(self.run(self.storage.commit(compares, operations)))
            assert outcome.current == {c.key: current.get(c.key) for c in compares}
            assert outcome.revision == self.model.newest
        else:
            self.model.apply(operations)
            assert self.run(self.storage.commit(compares, operations)) == Committed(self.model.newest)

    @precondition(lambda self: self.ended)
    @rule(key=keys)
    def put_with_an_ended_lease(self, key: str) -> None:
        with pytest.raises(NotFound):
            self.run(self.storage.commit([], [Put("/other", b""), Put(key, b"", min(self.ended))]))

    @rule(data=st.data(), prefix=st.sampled_from(PREFIXES), limit=st.integers(min_value=1, max_value=9))
    def list_in_pages(self, data: st.DataObject, prefix: str, limit: int) -> None:
        revision = data.draw(st.none() | st.integers(min_value=0, max_value=self.model.newest))
        at = self.model.newest if revision is None else revision
        if at < self.model.compacted:
            with pytest.raises(Compacted):
                self.run(self.storage.list(prefix, revision=revision))
            return
        found: list[Item] = []
        start_key = ""
        while True:
            page = self.run(self.storage.list(prefix, start_key=start_key, limit=limit, revision=revision))
            assert page.revision == at
            assert len(page.items) <= limit
            found += page.items
            start_key = page.next_key
            if not start_key:
                break
        state = self.model.states[at]
        assert found == [state[k] for k in sorted(state, key=str.encode) if k.startswith(prefix)]

    @rule(data=st.data(), prefix=st.sampled_from(PREFIXES))
    def watch(self, data: st.DataObject, prefix: str) -> None:
        after = data.draw(st.integers(min_value=0, max_value=self.model.newest + 1))
        if not self.model.compacted <= after <= self.model.newest:
            with pytest.raises(Compacted):
                self.run(anext(self.storage.watch(prefix, after_revision=after)))
            return
        wanted = self.model.batches(prefix, after)
        if not wanted:
            return
        got = self.run(
            read_watch(
                self.storage,
                prefix,
                after_revision=after,
                until=lambda b: len(b) >= len(wanted),
                timeout_s=5,
            )
        )
        assert [(b.revision, sorted(b.changes, key=lambda c: KEYS.index(c.key))) for b in got] == [
            (b.revision, list(b.changes)) for b in wanted
        ]

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        revision = data.draw(st.integers(min_value=0, max_value=self.model.newest + 1))
        if revision > self.model.newest:
            with pytest.raises(InvalidArgument):
                self.run(self.storage.compact(revision))
        else:
            self.run(self.storage.compact(revision))
            self.model.compacted = max(self.model.compacted, revision)

    @invariant()
    def holds_the_current_state(self) -> None:
        if hasattr(self, "storage"):
            assert self.run(self.storage.current_revision()) == self.model.newest
            for key in KEYS:
                assert self.run(self.storage.get(key)) == self.model.current.get(key)


class MemoryMachine(StoreMachine):
    """The memory backend."""

    def config(self) -> StoreConfig:
        return StoreConfig(backend="memory")


class SqliteMachine(StoreMachine):
    """The SQLite backend, which is closed and opened again in between."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="store-model-"))

    def config(self) -> StoreConfig:
        return StoreConfig(backend="sqlite", path=str(self.directory / "store.db"))

    @rule()
    def reopen(self) -> None:
        self.run(self.storage.aclose())
        self.storage = self.run(open_storage(self.config(), SystemClock()))

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.directory)


TestMemoryModel = MemoryMachine.TestCase
TestMemoryModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSqliteModel = SqliteMachine.TestCase
TestSqliteModel.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
