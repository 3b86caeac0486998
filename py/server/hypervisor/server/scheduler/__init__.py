"""Choosing nodes. ``contract`` is the interface and its values, ``plugins`` the filters and scores, ``default`` the
scheduler made of them, ``registry`` how a scheduler is chosen by name (built in, or an entry point of the group
``hypervisor.schedulers``). Everything here is pure: no store, no clock, no randomness but the request's seed.

::

    request, snapshot ──> every Filter, node by node ──> nodes that fit ──> every Score, weighted ──> Placement
                               │ none fits
                               └──> Refusal: one sentence per node
"""
