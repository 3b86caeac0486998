"""Native twin of _mux_py, _decoder_py and _ring_py: the same names, the same behaviour; one thread without the GIL."""

from hypervisor.ext.console_mux._decoder_py import FrameDecoder as FrameDecoder
from hypervisor.ext.console_mux._mux_py import ConsoleMux as ConsoleMux
from hypervisor.ext.console_mux._ring_py import Ring as Ring
