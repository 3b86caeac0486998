"""The console holder: a small process of each node that reads guests' consoles while agents come and go.

- ``program``, ``server``: the process. ``holding``: what it holds, over :mod:`hypervisor.ext.console_mux`;
  ``log_files``, ``time_index``: the consoles' logs on disk.
- ``protocol``: what agent and holder say to each other; ``channel``: its transport.
- ``launching``, ``client``: the agent's side.

The agent decides everything (what is attached, when viewers end, what is kept); the holder only holds, so that it can
stay the same while agents change.
"""
