"""The console's ring against a plain list of everything ever written."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hypervisor.agent.console_ring import ConsoleRing


class RingMachine(RuleBasedStateMachine):
    """Any writes, any viewers, any reads: what a viewer gets is the output, less what it was told it lost."""

    @initialize(capacity=st.integers(2, 20_000))
    def begin(self, capacity: int) -> None:
        self.ring = ConsoleRing(capacity)
        self.written = b""
        self.viewers: list[int] = []

    @rule(data=st.binary(max_size=300), times=st.integers(1, 60))
    def write(self, data: bytes, times: int) -> None:
        self.ring.append(data * times)
        self.written += data * times

    @rule(replay=st.integers(-1, 30_000))
    def join(self, replay: int) -> None:
        position = self.ring.replay_position(replay)
        kept = min(len(self.written), self.ring.capacity)
        assert len(self.written) - position == (kept if replay < 0 else min(replay, kept))
        self.viewers.append(position)

    @rule(index=st.integers(0, 10), limit=st.integers(1, 8192))
    def read(self, index: int, limit: int) -> None:
        if not self.viewers:
            return
        index %= len(self.viewers)
        position = self.viewers[index]
        chunk = self.ring.read(position, limit)
        begin = position + chunk.skipped
        assert chunk.position == begin + len(chunk.data)
        assert chunk.data == self.written[begin : chunk.position]
        assert len(chunk.data) <= limit
        assert chunk.skipped == 0 or position < self.ring.start
        assert bool(chunk.data) == (begin < len(self.written))
        self.viewers[index] = chunk.position

    @invariant()
    def keeps_exactly_its_capacity(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.end == len(self.written)
            assert self.ring.end - self.ring.start == min(len(self.written), self.ring.capacity)


TestRing = RingMachine.TestCase


@given(
    capacity=st.integers(2, 500),
    writes=st.lists(st.binary(min_size=1, max_size=700), min_size=1, max_size=20),
)
def test_a_viewer_that_reads_after_every_write_of_at_most_the_capacity_loses_nothing(
    capacity: int, writes: list[bytes]
) -> None:
    ring, position, seen = ConsoleRing(capacity), 0, b""
    for data in writes:
        for begin in range(0, len(data), capacity):
            ring.append(data[begin : begin + capacity])
            chunk = ring.read(position, capacity)
            assert chunk.skipped == 0
            position, seen = chunk.position, seen + chunk.data

    assert seen == b"".join(writes)


@given(capacity=st.integers(2, 500), extra=st.integers(1, 2000))
def test_a_viewer_that_was_skipped_gets_breathing_space(capacity: int, extra: int) -> None:
    ring = ConsoleRing(capacity)
    ring.append(bytes(capacity + extra))

    chunk = ring.read(0, 1 << 20)

    assert chunk.skipped > 0
    assert len(chunk.data) == capacity // 2
