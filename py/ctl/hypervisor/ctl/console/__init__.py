"""The terminal of an instance: ``escape`` (the key that leaves), ``terminal`` (ours, raw), ``attach`` (a session)."""
