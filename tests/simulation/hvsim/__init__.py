"""The simulator: whole clusters of the real server and agent code on virtual time, from a seed, with faults.

``cluster.py`` puts a cluster together, ``faults.py`` breaks it, ``checks.py`` says what must hold, ``__main__.py`` runs
seeds (``make simulate``). Everything random comes from the seed, so a seed is one run and can be replayed.
"""
