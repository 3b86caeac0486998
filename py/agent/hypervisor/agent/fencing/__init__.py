"""Fencing: a node that no server hears from stops by itself what could be started elsewhere.

``lease``: until when servers count on this node, measured from the last heartbeat that was answered, kept on disk.
``fence``: what may be started, and the loop that stops what has to be. ``guard``: a process of its own that does it in
the agent's place when that is dead or hangs. ``killing``: how, without any runtime.
"""
