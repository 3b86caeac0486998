"""The control plane: gRPC API, scheduler, operations, reconcile, store. ``app.py`` wires it, ``__main__`` starts it."""
