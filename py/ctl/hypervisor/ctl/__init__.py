"""hypervisor-ctl: the command line of Hypervisor.

Where things are, in the order a command meets them:

* ``__main__``: starts the program and turns every outcome into an exit code (``failures``).
* ``app``: the tree of commands; each module of ``commands/`` is imported when one of its commands runs.
* ``invocation``: what one run knows: global options, the chosen context, the session.
* ``settings``: the configuration file with its contexts; ``session``: the connection to a server.
* ``calls``: mutating calls: request ids, lost replies, progress; ``watching``: lists that follow the cluster.
* ``display/``: tables, JSON and YAML; ``quantities``, ``selectors``, ``manifest``: what users type, parsed.
* ``console/``: the terminal of an instance; ``dev/``: a whole cluster on one machine.

Start-up time is a feature (see docs/decisions/0007): what a command does not need is not imported.
"""
