"""What a server must know to open its store. Loaded and documented for users by the server's
configuration."""

from dataclasses import dataclass

__all__ = ["EtcdTls", "StoreConfig"]


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """TLS towards etcd; all paths name PEM files.

    ``ca_file`` empty: the system's authorities. ``cert_file`` and ``key_file`` (both or neither) identify this
    server to etcd. ``server_name`` replaces the name that the members' certificates must carry.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """One store.

    ``backend``              ``sqlite``, ``etcd`` or ``memory``: a row of ``open.BACKENDS``
    ``path``                 SQLite: the database file; ``<path>.lock`` and SQLite's ``-wal`` and ``-shm`` lie
                             beside it
    ``max_bytes``            SQLite: commits that would make the file larger are refused; 0: the disk decides
    ``history_revisions``    SQLite: how many revisions a watch or paged list can go back
    ``history_age_s``        SQLite: how far in time; whichever of the two is reached first
    ``endpoints``            etcd: ``host:port``, ``http://host:port`` or ``https://host:port`` of its members
    ``tls``                  etcd: None for plain text
    ``dial_timeout_s``       etcd: for one member to accept a connection
    ``request_timeout_s``    for one request, and how long a silent watch connection is trusted
    """

    backend: str = "sqlite"
    path: str = ""
    max_bytes: int = 0
    history_revisions: int = 100_000
    history_age_s: float = 3600.0
    endpoints: tuple[str, ...] = ()
    tls: EtcdTls | None = None
    dial_timeout_s: float = 5.0
    request_timeout_s: float = 10.0
