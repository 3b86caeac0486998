"""Who a container's process is: an image's ``User`` resolved by the image's own passwd and group files. Pure."""

from dataclasses import dataclass

from hypervisor.core.names import shorten

__all__ = ["ROOT", "Account", "resolve_account"]

_MAX_ID = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class Account:
    """Numeric user, group and further groups."""

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()


ROOT = Account()


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    value = int(text[:11])
    return value if value <= _MAX_ID else None


def _rows(text: str, fields: int) -> list[list[str]]:
    rows = (line.split(":") for line in text.splitlines() if not line.startswith("#"))
    return [row for row in rows if len(row) >= fields]


def resolve_account(user: str, *, passwd: str, group: str) -> Account:
    """The account of ``user``, ``user:group``, ``uid`` or ``uid:gid``; empty is root.

    A number needs no entry. Without a group it is the user's own group (0 where a number has no entry), and then
    further groups are those that list the user. Raises ValueError with a sentence for a name that has no entry.
    """
    if not user:
        return ROOT
    name, _, group_name = user.partition(":")
    uid = _number(name)
    accounts = [
        row for row in _rows(passwd, 4) if (row[0] == name if uid is None else _number(row[2]) == uid)
    ]
    entry = accounts[0] if accounts else None
    if uid is None:
        uid = _number(entry[2]) if entry is not None else None
        if uid is None:
            raise ValueError(f"its user {shorten(name)} is not in its /etc/passwd: use a numeric user id")
    groups = _rows(group, 4)
    if group_name:
        gid = _number(group_name)
        if gid is None:
            gid = next((_number(row[2]) for row in groups if row[0] == group_name), None)
        if gid is None:
            raise ValueError(
                f"its group {shorten(group_name)} is not in its /etc/group: use a numeric group id"
            )
        return Account(uid, gid)
    gid = (_number(entry[3]) if entry is not None else None) or 0
    further: list[int] = []
    if entry is not None:
        for row in groups:
            number = _number(row[2])
            if (
                number is not None
                and number != gid
                and entry[0] in row[3].split(",")
                and number not in further
            ):
                further.append(number)
    return Account(uid, gid, tuple(further))
