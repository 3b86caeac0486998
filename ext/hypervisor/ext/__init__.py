"""Compiled hot paths, each a package with a native implementation and a readable Python twin of the same behaviour.

The native one is used; ``HYPERVISOR_EXT_PURE=1`` picks the twins (for debugging and for platforms without a compiler).
There is no silent fallback: where the native module is missing the import fails. Nothing here imports the rest of the
project.
"""
