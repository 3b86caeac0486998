"""Lists, page by page, until the end or a limit; and the filter text of several conditions."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from hypervisor.ctl.output import note
from hypervisor.ctl.session import READ_TIMEOUT_S, Deadline, Session

if TYPE_CHECKING:
    import grpc

__all__ = ["Listing", "joined", "list_all"]

_PAGE = 1000


class Paged(Protocol):
    """A list request."""

    page_size: int
    page_token: str


class Page(Protocol):
    """A list answer."""

    next_page_token: str
    revision: int


R = TypeVar("R", bound=Paged)
P = TypeVar("P", bound=Page)
T = TypeVar("T")


class Listing(list[T]):
    """The items, and the revision at which the last page was true."""

    revision: int = 0


def joined(conditions: Sequence[str]) -> str:
    """The filter that holds when all conditions hold."""
    return ",".join(condition.strip() for condition in conditions if condition.strip())


def list_all(
    session: Session,
    method: "grpc.UnaryUnaryMultiCallable[R, P]",
    request: R,
    items: Callable[[P], Sequence[T]],
    *,
    limit: int | None = None,
    deadline: Deadline | None = None,
) -> Listing[T]:
    """All items of a list, or the first ``limit``. Says on standard error when the server's view is stale."""
    deadline = deadline or Deadline(READ_TIMEOUT_S)
    found: Listing[T] = Listing()
    while True:
        request.page_size = _PAGE if limit is None else min(_PAGE, limit - len(found))
        page = session.read(method, request, deadline=deadline)
        found.extend(items(page))
        found.revision = page.revision
        if getattr(page, "stale", False):
            note("Warning: the store cannot be reached; this is what the server knew last.")
        if not page.next_page_token or (limit is not None and len(found) >= limit):
            return found
        request.page_token = page.next_page_token
