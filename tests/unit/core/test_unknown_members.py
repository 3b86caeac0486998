"""What a later version has put into a record stays there when this version writes it."""

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.core.unknown_members import find_unknown, with_unknown


def test_members_of_a_later_version_are_found_at_any_depth() -> None:
    found = find_unknown(b'{"a":1,"new":[2],"in":{"b":3,"newer":{"c":4}}}', b'{"a":1,"in":{"b":3}}')

    assert found == {"new": [2], "in": {"newer": {"c": 4}}}


def test_what_is_known_is_taken_from_the_new_record() -> None:
    unknown = find_unknown(b'{"a":1,"new":2,"in":{"b":3,"newer":4}}', b'{"a":1,"in":{"b":3}}')
    assert unknown is not None

    written = msgspec.json.decode(with_unknown(b'{"a":5,"in":{"b":6}}', unknown))

    assert written == {"a": 5, "new": 2, "in": {"b": 6, "newer": 4}}


def test_an_object_that_is_gone_takes_its_unknown_members_along() -> None:
    unknown = find_unknown(b'{"in":{"b":3,"newer":4}}', b'{"in":{"b":3}}')
    assert unknown is not None

    assert with_unknown(b'{"a":1}', unknown) == b'{"a":1}'


def test_nothing_is_found_in_a_record_of_this_version() -> None:
    assert find_unknown(b'{"a":1,"b":2}', b'{"b":2,"a":1}') is None
    assert find_unknown(b'{"a":1}', b'{"a":1,"added":[]}') is None


_VALUES = st.recursive(
    st.none() | st.integers(0, 9) | st.text(max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)
_OBJECTS = st.dictionaries(st.sampled_from("abcdef"), _VALUES, max_size=5)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(later=_OBJECTS, mine=st.sets(st.sampled_from("abcdef")))
def test_a_record_written_back_unchanged_is_the_record(later: dict[str, object], mine: set[str]) -> None:
    known = msgspec.json.encode({name: value for name, value in later.items() if name in mine})

    unknown = find_unknown(msgspec.json.encode(later), known)

    assert msgspec.json.decode(known if unknown is None else with_unknown(known, unknown)) == later
