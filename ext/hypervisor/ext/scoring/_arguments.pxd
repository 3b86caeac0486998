"""Numbers that come from callers, checked: shared by :mod:`._request_c` and :mod:`._table_c`. As ``within`` in _rules.py."""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    MAX_AMOUNT = (1 << 30) - 1
    MAX_NODES = 1 << 20
    MAX_DOMAINS = 1 << 20

cdef extern from "Python.h":
    long long PyLong_AsLongLong(object value) except? -1
    unsigned long long PyLong_AsUnsignedLongLong(object value) except? <unsigned long long> -1


cdef inline int64_t within(str name, object value, int64_t low, int64_t high) except? -2:
    """The number, checked; ValueError also where it is too long for any C type."""
    cdef int64_t number
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    try:
        number = PyLong_AsLongLong(value)
    except OverflowError:
        raise ValueError(f"{name} must be {low}..{high}, not {value}") from None
    if number < low or number > high:
        raise ValueError(f"{name} must be {low}..{high}, not {value}")
    return number


cdef inline uint64_t unsigned(str name, object value) except? 0:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    try:
        return PyLong_AsUnsignedLongLong(value)
    except OverflowError:
        raise ValueError(f"{name} must be 0..{(1 << 64) - 1}, not {value}") from None
