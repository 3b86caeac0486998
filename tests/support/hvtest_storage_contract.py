"""The one contract suite of Storage, run against every backend by ``tests/contract/test_storage_contract.py``."""

import uuid

import pytest

from hvtest_storage import unique_root
from hvtest_storage_commits import CommitContract, ReadContract
from hvtest_storage_leases import ElectionContract, LeaseContract
from hvtest_storage_watches import WatchContract

__all__ = ["StorageContract"]


class StorageContract(CommitContract, ReadContract, WatchContract, LeaseContract, ElectionContract):
    """Subclass it with a fixture ``storage`` that opens the backend and closes it after the test.

    The backend may be shared: every test keeps to keys of its own and to revisions relative to its start.
    """

    @pytest.fixture
    def root(self) -> str:
        """A prefix of the test's own."""
        return unique_root()

    @pytest.fixture
    def election_name(self) -> str:
        """An election of the test's own."""
        return f"test-{uuid.uuid4().hex}"
