"""Import gRPC without its asyncio half, which this program never uses and which is half of gRPC's start-up time.

``import grpc`` imports ``asyncio`` (from its compiled core) and ``grpc.aio``, and touches neither until an
asynchronous channel is made. :func:`defer` puts a stand-in for each in ``sys.modules`` that imports the real module
at the first look at any of its attributes, so that code which does need them still works.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

__all__ = ["defer", "hear_core_again", "silence_core"]

_DEFERRED = ("asyncio", "grpc.aio")


class _Deferred(ModuleType):
    """Stands for a module until the first look at one of its attributes, then becomes it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(
            "__"
        ):  # the import system asks for __path__, __spec__ and the like: no use of the module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        self.__dict__.update(real.__dict__)
        return getattr(real, name)


def silence_core() -> None:
    """Keep gRPC's C core from writing to standard error beside us. Before the first ``import grpc``.

    What it has to say about connections comes in the errors of the calls; GRPC_VERBOSITY, where set, is respected.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def hear_core_again() -> None:
    """Undo :func:`silence_core` for programs that are started from here and have logs of their own."""
    if os.environ.get("GRPC_VERBOSITY") == "NONE":
        del os.environ["GRPC_VERBOSITY"]


def defer() -> None:
    """Call before the first ``import grpc``; does nothing for modules that are there already."""
    for name in _DEFERRED:
        if name not in sys.modules:
            sys.modules[name] = _Deferred(name)
