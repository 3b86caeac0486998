"""Calls to containerd that a cancellation must not tear apart."""

from hypervisor.core.uninterrupted import uninterrupted

__all__ = ["uninterrupted"]
