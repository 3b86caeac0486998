"""The native request, for :mod:`._table_c`: what was asked for, as C has it."""

from libc.stdint cimport int32_t

from hypervisor.ext.scoring._engine cimport Wanted


cdef class Request:
    cdef Wanted wanted

    cdef tuple soft(self, int32_t kind)
