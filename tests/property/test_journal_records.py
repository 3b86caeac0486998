"""The journal's format: whatever happens to the end of the file, a prefix of the records is read back."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.journal_records import HEADER, Forget, Put, Record, Started, frame, replay

_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
_ENTRIES = st.builds(
    Entry,
    instance_id=_NAMES,
    driver=_NAMES,
    generation=st.integers(1, 1 << 40),
    epoch=st.integers(1, 1 << 40),
    phase=st.sampled_from(Phase),
    since=st.integers(0, 1 << 32).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    handle=st.dictionaries(_NAMES, _NAMES, max_size=3),
)
_RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(Put, _ENTRIES),
    st.builds(Forget, _NAMES, st.integers(1, 1 << 40)),
    st.builds(Started, st.integers(0, 1 << 40)),
)


@given(st.lists(_RECORDS, max_size=10), st.integers(0, 100))
def test_what_was_framed_is_replayed(records: list[Record], allocated: int) -> None:
    data = HEADER + b"".join(map(frame, records)) + bytes(allocated)

    found = replay(data, path="journal")

    assert list(found.records) == records
    assert (found.end, found.torn_bytes) == (len(data) - allocated, 0)


@given(st.lists(_RECORDS, min_size=1, max_size=6), st.data())
def test_a_cut_leaves_a_prefix(records: list[Record], data: st.DataObject) -> None:
    whole = HEADER + b"".join(map(frame, records))
    cut = data.draw(st.integers(len(HEADER), len(whole)))

    found = replay(whole[:cut], path="journal")

    assert list(found.records) == records[: len(found.records)]
    assert found.end <= cut


@given(st.lists(_RECORDS, min_size=1, max_size=6), st.data())
def test_a_flipped_bit_is_never_read_as_a_record(records: list[Record], data: st.DataObject) -> None:
    whole = bytearray(HEADER + b"".join(map(frame, records)))
    position = data.draw(st.integers(len(HEADER), len(whole) - 1))
    whole[position] ^= 1 << data.draw(st.integers(0, 7))

    found = replay(bytes(whole), path="journal")

    assert found.end <= position
    assert list(found.records) == records[: len(found.records)]
