"""Virtual machines on this node, run by libvirt (QEMU with KVM, or with its own emulation where KVM runs no guests).

Modules, from the outside in: :mod:`.driver` (the ``Driver`` contract and its powers: order of calls, one instance at a
time), :mod:`.snapshots`, :mod:`.events` (what happens by itself), :mod:`.specification` (what is asked for, checked),
:mod:`.building` with :mod:`.base_files`, :mod:`.disks` and :mod:`.seed` (what belongs to a machine), :mod:`.domain_xml`
(how libvirt is told of it), :mod:`.console` (its serial line), :mod:`.record` and :mod:`.observing` (what is known),
:mod:`.tracking`, :mod:`.stats`, :mod:`.accelerator` (whether KVM works), :mod:`.machines` and :mod:`.connection` with
:mod:`.failures` (the calls).

The domain bears the instance's id as its name and the driver's record as its metadata; disk and seed are in
``<data_dir>/instances/<id>``, the console's FIFOs in ``<data_dir>/consoles/<id>``. Nothing of it depends on the
agent or on libvirtd: guests run on without either. Imports libvirt's module, which needs libvirt's shared library.
"""

from hypervisor.agent.drivers.libvirt.config import LibvirtConfig
from hypervisor.agent.drivers.libvirt.driver import LibvirtDriver

__all__ = ["LibvirtConfig", "LibvirtDriver"]
