"""The node table: exact choice of the best node for a request, kept up to date node by node, placements in batches.

Vocabulary
----------
*slot*        a node's row, a small number that stays until the node is removed; freed slots are used again.
*column*      one int32 a slot: free and total processors (millicores), memory (MiB), disk (GiB); bits; load; penalty.
*class*       a yes/no column by id, for whatever the caller evaluates itself once a node (labels, taints, a zone).
*preference*  a 0..1000 column by id, for whatever the caller rates itself once a node (an image that is there).
*group*       one division of the nodes into *domains* (by host name, zone, rack); a node without one has domain -1.
*counter*     a count for each domain of one group: how many instances there match some selector of the caller's.
*request*     what is to be placed, compiled once; the same request can be used any number of times, with any seed.

``NodeTable`` and ``Request`` are documented in :mod:`._table_py`, the formulas of the scores in :mod:`._rules`.
``implementation`` says which one is live (``native`` or ``python``); programs log it at start.
"""

import os

from hypervisor.ext.scoring._rules import (
    BINPACK,
    MAX_AMOUNT,
    MAX_DOMAINS,
    MAX_NODES,
    SPREAD,
    Failure,
    Judgement,
    NodeRow,
    Part,
    tie_key,
)

__all__ = [
    "BINPACK",
    "MAX_AMOUNT",
    "MAX_DOMAINS",
    "MAX_NODES",
    "SPREAD",
    "Failure",
    "Judgement",
    "NodeRow",
    "NodeTable",
    "Part",
    "Request",
    "implementation",
    "tie_key",
]

if os.environ.get("HYPERVISOR_EXT_PURE") == "1":
    from hypervisor.ext.scoring._request_py import Request
    from hypervisor.ext.scoring._table_py import NodeTable

    implementation = "python"
else:
    from hypervisor.ext.scoring._request_c import Request
    from hypervisor.ext.scoring._table_c import NodeTable

    implementation = "native"
