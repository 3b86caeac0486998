"""Choosing nodes. ``contract`` is the interface and its values, ``plugins`` the filters and scores; ``judge`` applies
them node by node on a ``case`` (a request and a snapshot); ``table`` has the cluster as the native node table, with
``columns`` and the counts of ``places``; ``default`` is the scheduler made of these, ``registry`` how a scheduler is
chosen by name. Everything here is pure: no store, no clock, no randomness but the request's seed.

::

    snapshot ──(what changed)──> table: columns, counts        rules (plugins, judge): the same, readable
                                   │                             │
    request ────(compiled)─────────┴──> best node ──> Placement  ├──> why, and what else: explanations
                                   none fits ────────────────────┴──> Refusal: one sentence per node
"""
