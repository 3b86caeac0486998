"""MicroVMs: one driver over several VMMs (Firecracker, QEMU).

``driver`` is the contract. ``vmm`` says what a VMM has to be able to do and holds the vocabulary of this package;
``firecracker`` is one (``firecracker_api`` its socket, ``firecracker_config`` its requests, ``firecracker_end`` what
its end means, ``jailer`` its jail). ``choosing`` decides which VMM runs an instance. ``creating`` checks a
specification and copies files, ``runner`` makes and ends processes with control groups, taps and console FIFOs,
``tracking`` finds and watches instances by their ``records``, ``snapshots`` keeps states.
"""

from hypervisor.agent.drivers.microvm.config import MicrovmConfig
from hypervisor.agent.drivers.microvm.driver import MicrovmDriver
from hypervisor.agent.drivers.microvm.firecracker import FirecrackerVmm

__all__ = ["FirecrackerVmm", "MicrovmConfig", "MicrovmDriver"]
