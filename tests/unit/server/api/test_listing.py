from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.api.listing import (
    MAX_PAGE_SIZE,
    Field,
    Listing,
    ListPage,
    ListQuery,
    PageMemo,
)


@dataclass(frozen=True)
class Thing:
    id: str
    name: str
    color: str = "red"
    labels: tuple[tuple[str, str], ...] = ()


THINGS: Listing[Thing] = Listing(
    fields={
        "id": Field(lambda t: t.id),
        "name": Field(lambda t: t.name, prefix=True),
        "color": Field(lambda t: t.color, choices=("red", "green")),
    },
    orders={"name": lambda t: t.name, "color": lambda t: t.color},
    default_order="name",
    identity=lambda t: t.id,
    labels=lambda t: dict(t.labels),
)


def query(
    page_size: int = 0, page_token: str = "", filter: str = "", order_by: str = "", scope: str = ""
) -> ListQuery:
    return ListQuery(page_size, page_token, filter, order_by, scope)


def all_pages(things: list[Thing], *, size: int, order_by: str = "", filter: str = "") -> list[list[Thing]]:
    pages: list[list[Thing]] = []
    token = ""
    while True:
        page: ListPage[Thing] = THINGS.page(query(size, token, filter, order_by), things)
        pages.append(list(page.items))
        token = page.next_page_token
        if not token:
            return pages


things_of_any_kind = st.lists(
    st.builds(
        Thing,
        id=st.text(st.characters(codec="utf-8", min_codepoint=1), min_size=1, max_size=4),
        name=st.text(st.characters(codec="utf-8", min_codepoint=1), max_size=3),
        color=st.sampled_from(["red", "green"]),
    ),
    unique_by=lambda t: t.id,
    max_size=30,
)


@given(
    things_of_any_kind, st.integers(1, 7), st.sampled_from(["", "name", "name desc", "color", "color desc"])
)
def test_pages_together_are_the_whole_in_order(things: list[Thing], size: int, order_by: str) -> None:
    pages = all_pages(things, size=size, order_by=order_by)

    joined = [thing for page in pages for thing in page]
    by_color = order_by.startswith("color")
    expected = sorted(things, key=lambda t: f"{t.color if by_color else t.name}\0{t.id}")
    assert joined == (expected[::-1] if order_by.endswith("desc") else expected)
    assert all(len(page) == size for page in pages[:-1])


@given(things_of_any_kind, things_of_any_kind, st.integers(1, 5), st.sampled_from(["name", "name desc"]))
def test_what_stays_is_listed_exactly_once_whatever_comes_and_goes(
    before: list[Thing], after: list[Thing], size: int, order_by: str
) -> None:
    first = THINGS.page(query(size, order_by=order_by), before)
    stable = {t.id: t for t in before if t in after}
    seen = [t.id for t in first.items]
    token = first.next_page_token
    while token:
        page = THINGS.page(query(size, token, order_by=order_by), after)
        seen += [t.id for t in page.items]
        token = page.next_page_token

    for thing_id in stable:
        if first.next_page_token or thing_id in {t.id for t in first.items}:
            assert seen.count(thing_id) == 1


@given(things_of_any_kind)
def test_filtering_agrees_with_plain_python(things: list[Thing]) -> None:
    found = THINGS.page(query(MAX_PAGE_SIZE, filter="color=green, name!=ab"), things).items

    assert {t.id for t in found} == {t.id for t in things if t.color == "green" and t.name != "ab"}


def test_a_trailing_star_matches_any_end_where_the_field_allows_it() -> None:
    things = [Thing("1", "web-1"), Thing("2", "web-2"), Thing("3", "db")]

    assert [t.id for t in THINGS.page(query(filter="name=web*"), things).items] == ["1", "2"]
    assert [t.id for t in THINGS.page(query(filter="name!=web*"), things).items] == ["3"]
    assert [t.id for t in THINGS.page(query(filter="id=1*"), things).items] == []


def test_labels_are_compared_by_key_and_absent_is_not_equal() -> None:
    things = [
        Thing("1", "a", labels=(("t", "x"),)),
        Thing("2", "b", labels=(("a.b/c", "y"),)),
        Thing("3", "c"),
    ]

    assert [t.id for t in THINGS.page(query(filter="labels.t=x"), things).items] == ["1"]
    assert [t.id for t in THINGS.page(query(filter="labels.a.b/c=y"), things).items] == ["2"]
    assert [t.id for t in THINGS.page(query(filter="labels.t!=x"), things).items] == ["2", "3"]


def test_choices_are_compared_without_case() -> None:
    assert len(THINGS.page(query(filter="color=GREEN"), [Thing("1", "a", "green")]).items) == 1


def test_a_page_has_a_hundred_unless_asked_and_a_thousand_at_most() -> None:
    things = [Thing(f"{n:05d}", "n") for n in range(1500)]

    assert len(THINGS.page(query(), things).items) == 100
    assert len(THINGS.page(query(5000), things).items) == 1000


@pytest.mark.parametrize(
    ("wrong", "field", "sentence"),
    [
        (query(page_size=-1), "page_size", "is -1: give 0 (for 100) or 1 to 1000"),
        (query(order_by="size"), "order_by", "'size' is not known: use one of name, color"),
        (query(order_by="name up"), "order_by", "add ' desc' to reverse"),
        (
            query(filter="size=3"),
            "filter",
            "'size' is not a field to filter by: use one of id, name, color, labels",
        ),
        (query(filter="name"), "filter", "'name' is no condition: write field=value or field!=value"),
        (query(filter="color=blue"), "filter", "color cannot be 'blue': use one of red, green"),
        (query(filter="x" * 10_000_000), "filter", "is 10000000 characters long: use at most 4096"),
        (query(page_token="gibberish"), "page_token", "does not belong to this list"),
        (query(page_token="x" * 10_000_000), "page_token", "does not belong to this list"),
    ],
)
def test_a_wrong_argument_is_named_with_its_remedy(wrong: ListQuery, field: str, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        THINGS.page(wrong, [])

    assert refused.value.reason == "INVALID_LIST_ARGUMENT"
    assert [v.field for v in refused.value.violations] == [field]
    assert sentence in refused.value.violations[0].description
    assert len(refused.value.message) < 500


def test_all_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(InvalidArgument) as refused:
        THINGS.page(query(-1, "x", "y", "z"), [])

    assert [v.field for v in refused.value.violations] == ["page_size", "filter", "order_by", "page_token"]


@pytest.mark.parametrize(
    "other", [query(order_by="color"), query(filter="color=red"), query(scope="project-2")]
)
def test_a_token_of_another_list_is_refused(other: ListQuery) -> None:
    things = [Thing("1", "a"), Thing("2", "b")]
    token = THINGS.page(query(1), things).next_page_token

    with pytest.raises(InvalidArgument, match="page_token"):
        THINGS.page(query(1, token, other.filter, other.order_by, other.scope), things)


@given(st.data())
def test_a_changed_token_is_refused(data: st.DataObject) -> None:
    things = [Thing("1", "a"), Thing("2", "b")]
    token = THINGS.page(query(1), things).next_page_token
    position = data.draw(st.integers(0, len(token) - 2))
    other = data.draw(st.sampled_from("ABCXYZabcxyz012-_").filter(lambda c: c != token[position]))

    with pytest.raises(InvalidArgument, match="page_token"):
        THINGS.page(query(1, token[:position] + other + token[position + 1 :]), things)


@given(
    things_of_any_kind,
    things_of_any_kind,
    st.sampled_from(["", "name desc"]),
    st.sampled_from(["", "color=red"]),
)
def test_remembered_lists_are_the_same_as_fresh_ones(
    one: list[Thing], other: list[Thing], order_by: str, filter: str
) -> None:
    memo: PageMemo[Thing] = PageMemo(limit=2)
    many = [Thing(f"\x01{n}", "many") for n in range(150)]

    for version, things in ((1, one + many), (1, one + many), (2, other + many), (1, one + many)):
        wanted = query(5, "", filter, order_by)
        fresh, kept = THINGS.page(wanted, things), THINGS.page(wanted, things, memo=memo, version=version)
        assert kept == fresh


def test_a_remembered_list_is_not_made_again() -> None:
    memo: PageMemo[Thing] = PageMemo()
    things = [Thing(f"{n:03d}", "x") for n in range(300)]
    first = THINGS.page(query(), things, memo=memo, version=1)

    second = THINGS.page(query(page_token=first.next_page_token), iter(()), memo=memo, version=1)

    assert [t.id for t in second.items] == [f"{n:03d}" for n in range(100, 200)]
