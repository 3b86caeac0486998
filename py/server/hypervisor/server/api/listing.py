"""Lists: filter, order and pages over values in memory, one implementation for all resources. Pure.

A page token holds the sort key of the last item sent, not a position: items that come and go between two pages never
make another one appear twice or be left out. It also holds a digest of the other arguments, so that a token of
another list, or one that was changed, is refused and not misread.
"""

import base64
import binascii
import bisect
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Generic, TypeVar

from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.names import shorten

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "MAX_PAGE_SIZE",
    "Field",
    "ListPage",
    "ListQuery",
    "Listing",
    "PageMemo",
    "sortable_time",
]

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_ARGUMENT_CHARACTERS = 4096
"""Of a filter, order or token."""

T = TypeVar("T")
_DIGEST_BYTES = 12


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """Something to filter by. ``choices``: all values it can have; ``prefix``: a trailing ``*`` matches any end."""

    get: Callable[[T], str]
    choices: tuple[str, ...] | None = None
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class ListQuery:
    """The arguments of a List call. ``scope`` stands for its own ones (a project); they bind the token too."""

    page_size: int
    page_token: str
    filter: str
    order_by: str
    scope: str = ""


@dataclass(frozen=True, slots=True)
class ListPage(Generic[T]):
    """One page; ``next_page_token`` is empty at the end."""

    items: Sequence[T]
    next_page_token: str


class PageMemo(Generic[T]):
    """Sorted lists of the newest version, ``limit`` at most, so that the second page costs no second sorting."""

    def __init__(self, *, limit: int = 8) -> None:
        self._limit = limit
        self._version: object = None
        self._kept: dict[tuple[str, str, str], list[tuple[str, T]]] = {}

    def find(self, version: object, wanted: tuple[str, str, str]) -> list[tuple[str, T]] | None:
        """The list kept for these arguments, if it is of this version."""
        return self._kept.get(wanted) if version == self._version else None

    def keep(self, version: object, wanted: tuple[str, str, str], keyed: list[tuple[str, T]]) -> None:
        """Keep a list that has more than one page's worth; lists of other versions are forgotten."""
        if version != self._version:
            self._kept.clear()
            self._version = version
        if len(keyed) > DEFAULT_PAGE_SIZE:
            if len(self._kept) >= self._limit:
                del self._kept[next(iter(self._kept))]
            self._kept[wanted] = keyed


Test = Callable[[T], bool]


def sortable_time(value: datetime | None) -> str:
    """A time (UTC) as text that sorts like it; the empty text where there is none."""
    return "" if value is None else value.strftime("%Y-%m-%dT%H:%M:%S.%f")


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """How one kind of resource is listed.

    ``orders`` gives the text to sort by for each legal ``order_by``; ties are broken by ``identity``, which is unique.
    """

    fields: Mapping[str, Field[T]]
    orders: Mapping[str, Callable[[T], str]]
    default_order: str
    identity: Callable[[T], str]
    labels: Callable[[T], Mapping[str, str]] | None = None

    def page(
        self,
        query: ListQuery,
        items: Iterable[T],
        *,
        memo: "PageMemo[T] | None" = None,
        version: object = None,
    ) -> ListPage[T]:
        """The page asked for. InvalidArgument with every wrong argument at once.

        ``memo`` keeps what was filtered and sorted for the next page; ``version`` stands for the state of ``items``:
        the same version, the same items.
        """
        violations: list[FieldViolation] = []
        if query.page_size < 0:
            violations.append(
                FieldViolation("page_size", f"is {query.page_size}: give 0 (for 100) or 1 to 1000")
            )
        tests = self._parse_filter(query.filter, violations)
        order, descending = self._parse_order(query.order_by, violations)
        after = _parse_token(query, violations)
        if violations:
            raise InvalidArgument.of_fields(tuple(violations), reason="INVALID_LIST_ARGUMENT")
        size = min(query.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        wanted = (query.filter, query.order_by, query.scope)
        keyed = None if memo is None else memo.find(version, wanted)
        if keyed is None:
            for test in tests:
                items = filter(test, items)
            value_of, identity = self.orders[order], self.identity
            # One text for value and identity: NUL sorts before everything that stands in either.
            keyed = [(f"{value_of(item)}\0{identity(item)}", item) for item in items]
            keyed.sort(key=_sort_key, reverse=descending)
            if memo is not None:
                memo.keep(version, wanted, keyed)
        begin = 0 if after is None else _begin_after(keyed, after, descending=descending)
        chosen = keyed[begin : begin + size]
        more = begin + size < len(keyed)
        return ListPage([item for _, item in chosen], _make_token(query, chosen[-1][0]) if more else "")

    def _parse_order(self, order_by: str, violations: list[FieldViolation]) -> tuple[str, bool]:
        words = (order_by if order_by.strip() else self.default_order).split()
        if len(words) > 2 or words[0] not in self.orders or words[1:] not in ([], ["desc"], ["asc"]):
            known = ", ".join(self.orders)
            violations.append(
                FieldViolation(
                    "order_by",
                    f"{shorten(order_by)} is not known: use one of {known}; add ' desc' to reverse",
                )
            )
            return next(iter(self.orders)), False
        return words[0], words[1:] == ["desc"]

    def _parse_filter(self, text: str, violations: list[FieldViolation]) -> list[Test[T]]:
        tests: list[Test[T]] = []
        if len(text) > MAX_ARGUMENT_CHARACTERS:
            violations.append(
                FieldViolation(
                    "filter", f"is {len(text)} characters long: use at most {MAX_ARGUMENT_CHARACTERS}"
                )
            )
            return tests
        for condition in filter(None, (part.strip() for part in text.split(","))):
            try:
                tests.append(self._parse_condition(condition))
            except ValueError as exc:
                violations.append(FieldViolation("filter", str(exc)))
        return tests

    def _parse_condition(self, condition: str) -> Test[T]:
        name, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"{shorten(condition)} is no condition: write field=value or field!=value")
        negated = name.endswith("!")
        name, value = name.removesuffix("!").strip(), value.strip()
        if self.labels is not None and name.startswith("labels.") and len(name) > len("labels."):
            labels, key = self.labels, name.removeprefix("labels.")
            return _test(lambda item: labels(item).get(key), value, negated=negated, prefix=False)
        field = self.fields.get(name)
        if field is None:
            known = ", ".join((*self.fields, *(("labels.KEY",) if self.labels is not None else ())))
            raise ValueError(f"{shorten(name)} is not a field to filter by: use one of {known}")
        if field.choices is not None:
            value = value.lower()
            if value not in field.choices:
                raise ValueError(f"{name} cannot be {shorten(value)}: use one of {', '.join(field.choices)}")
        return _test(field.get, value, negated=negated, prefix=field.prefix)


def _equals(item: T, *, get: Callable[[T], str | None], value: str) -> bool:
    return get(item) == value


def _differs(item: T, *, get: Callable[[T], str | None], value: str) -> bool:
    return get(item) != value


def _test(get: Callable[[T], str | None], value: str, *, negated: bool, prefix: bool) -> Test[T]:
    if prefix and value.endswith("*"):
        beginning = value[:-1]
        return lambda item: (get(item) or "").startswith(beginning) is not negated
    return partial(_differs if negated else _equals, get=get, value=value)


def _sort_key(pair: tuple[str, object]) -> str:
    return pair[0]


def _begin_after(keyed: Sequence[tuple[str, T]], after: str, *, descending: bool) -> int:
    """Index of the first item behind the key ``after``, which need not be there any more."""
    if not descending:
        return bisect.bisect_right(keyed, after, key=_sort_key)
    low, high = 0, len(keyed)
    while low < high:
        middle = (low + high) // 2
        if keyed[middle][0] >= after:
            low = middle + 1
        else:
            high = middle
    return low


def _digest(query: ListQuery, key: bytes) -> bytes:
    parts = (query.filter.encode(), query.order_by.encode(), query.scope.encode(), key)
    summed = hashlib.sha256(b"page-token-1")
    for part in parts:
        summed.update(len(part).to_bytes(8, "big") + part)
    return summed.digest()[:_DIGEST_BYTES]


def _make_token(query: ListQuery, key: str) -> str:
    raw = key.encode()
    return base64.urlsafe_b64encode(_digest(query, raw) + raw).decode().rstrip("=")


def _parse_token(query: ListQuery, violations: list[FieldViolation]) -> str | None:
    token = query.page_token
    if not token:
        return None
    try:
        if len(token) > MAX_ARGUMENT_CHARACTERS:
            raise ValueError("too long")
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, raw = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest == _digest(query, raw):
            return raw.decode()
    except (ValueError, binascii.Error):
        pass
    violations.append(
        FieldViolation(
            "page_token",
            "does not belong to this list: pass next_page_token of the page before with the same filter, order_by "
            "and scope, or leave it empty to begin again",
        )
    )
    return None
