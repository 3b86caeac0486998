"""Where the cluster's state lives: the Storage contract and its backends (SQLite, etcd, memory for tests).

Read :mod:`hypervisor.server.store.storage` first: it is the contract. Only ``app.py`` chooses a backend.
"""
