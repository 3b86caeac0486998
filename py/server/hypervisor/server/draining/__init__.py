"""Emptying nodes, bringing instances home, and disruption budgets.

``records.py`` what is stored; ``budgets.py`` and ``stepping.py`` decide, purely; ``planning.py`` is the plan of a
``--dry-run``; ``keeper.py`` does the leader's work; ``service.py`` serves the calls.
"""
