"""Who an image's process runs as."""

import pytest

from hypervisor.agent.drivers.containerd.accounts import Account, resolve_account

PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\n# a comment\nweb:x:33:34:Web:/srv:/bin/false\nbroken\nodd:x:minus:1::/:\n"
)
GROUP = "root:x:0:\nwww:x:34:\nlog:x:4:web,other\nssl:x:110:web\n"


@pytest.mark.parametrize(
    ("user", "account"),
    [
        ("", Account(0, 0)),
        ("root", Account(0, 0)),
        ("web", Account(33, 34, (4, 110))),
        ("33", Account(33, 34, (4, 110))),
        ("web:log", Account(33, 4)),
        ("web:7", Account(33, 7)),
        ("1234", Account(1234, 0)),
        ("1234:5678", Account(1234, 5678)),
    ],
)
def test_names_and_numbers_are_resolved_by_the_files_of_the_image(user: str, account: Account) -> None:
    assert resolve_account(user, passwd=PASSWD, group=GROUP) == account


@pytest.mark.parametrize("user", ["nobody", "web:nogroup", "odd", "-1", "99999999999999", "4294967295"])
def test_what_cannot_be_resolved_says_which_file_lacks_it(user: str) -> None:
    with pytest.raises(ValueError, match=r"/etc/(passwd|group)"):
        resolve_account(user, passwd=PASSWD, group=GROUP)


def test_an_image_without_the_files_can_use_numbers_only() -> None:
    assert resolve_account("12:34", passwd="", group="") == Account(12, 34)
