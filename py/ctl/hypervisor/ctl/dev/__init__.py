"""``dev``: a whole cluster on one machine, started and supervised by this program.

* ``plan``: what is to run, as values: paths, ports, configuration files, processes. Pure.
* ``preflight``: what must hold before anything is started, each with a sentence that says how to mend it.
* ``processes``: identity of processes beyond their number; ``state``: what is on record of a running cluster.
* ``supervisor``: the process that starts the others, and starts again what dies.
* ``cluster``: ``up``, ``down`` and ``status`` put together; ``sweep``: removes what a crash left behind.
"""
