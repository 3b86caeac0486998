"""Images on the node: fetched from the servers when an instance needs them, kept, shared, and collected when unused.

``cache.py``       what is kept, by whom it is used, and what goes when room is needed
``providing.py``   what the manager asks: the images of an instance, as files
"""
