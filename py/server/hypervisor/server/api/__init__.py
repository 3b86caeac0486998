"""The gRPC API: requests in, domain values to the services, messages out.

``rpc.py`` is what happens around every call. One file for each resource has its handlers (``instances.py``,
``nodes.py``, ``operations.py``, ``events.py``, ``console.py``); ``*_requests.py`` checks what comes in, purely;
``listing.py`` filters, orders and pages; ``encoding.py`` makes the answers. ``service.py`` puts them together.
"""
