"""Native twin of _parser_py: the same names, the same behaviour; reads and parses without the GIL."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EINTR, errno
from libc.stdint cimport INT64_MAX, int64_t
from libc.string cimport memcmp
from posix.unistd cimport pread

import os

UNLIMITED = INT64_MAX
MAX_FILE_BYTES = 65536

cdef enum:
    BUFFER_BYTES = 65536 + 1
    MAX_NAMES = 64

cdef struct Name:
    const char* text
    Py_ssize_t length
    int64_t total
    bint found


cdef inline bint is_separator(char byte) noexcept nogil:
    return byte == 32 or byte == 9 or byte == 10 or byte == 61  # blank, tab, line end, '='


cdef inline int64_t value_of(const char* word, Py_ssize_t length) noexcept nogil:
    """The word's value, or -1 when it is no number. ``length`` is at least 1."""
    cdef int64_t value = 0
    cdef int digit
    cdef Py_ssize_t i
    if length == 3 and memcmp(word, b"max", 3) == 0:
        return INT64_MAX
    for i in range(length):
        digit = word[i] - 48
        if digit < 0 or digit > 9:
            return -1
        # Saturate, and go on: a later byte may show that it is no number at all.
        if value > (INT64_MAX - digit) // 10:
            value = INT64_MAX
        elif value != INT64_MAX:
            value = value * 10 + digit
    return value


cdef inline void add(Name* name, int64_t value) noexcept nogil:
    if value < 0:
        return
    name.found = True
    if value > INT64_MAX - name.total:
        name.total = INT64_MAX
    else:
        name.total += value


cdef void parse(const char* data, Py_ssize_t size, Name* names, Py_ssize_t count) noexcept nogil:
    """Fill in the totals. Reads only ``data[0:size]``: every index below is checked against ``size`` first."""
    cdef Py_ssize_t at = 0, start, length, i
    cdef const char* previous = NULL
    cdef Py_ssize_t previous_length = 0
    cdef int64_t value
    while True:
        while at < size and is_separator(data[at]):
            at += 1
        if at >= size:
            return
        start = at
        while at < size and not is_separator(data[at]):
            at += 1
        length = at - start
        value = value_of(data + start, length)
        if value >= 0:
            for i in range(count):
                if previous == NULL:
                    if names[i].length == 0:
                        add(&names[i], value)
                elif names[i].length == previous_length and memcmp(names[i].text, previous, previous_length) == 0:
                    add(&names[i], value)
        previous = data + start
        previous_length = length


cdef Py_ssize_t read_all(int fd, char* buffer) noexcept nogil:
    """Bytes read into a buffer of ``BUFFER_BYTES``, or -1 with ``errno`` set."""
    cdef Py_ssize_t size = 0, part
    while size < BUFFER_BYTES:
        part = pread(fd, buffer + size, BUFFER_BYTES - size, size)
        if part < 0:
            if errno == EINTR:
                continue
            return -1
        if part == 0:
            break
        size += part
    return size


cdef Py_ssize_t prepare(tuple wanted, Name* names) except -1:
    """Point ``names`` into the bytes objects of ``wanted``, which has to outlive them."""
    cdef Py_ssize_t count = len(wanted), i
    cdef object name
    if count > MAX_NAMES:
        raise ValueError(f"at most {MAX_NAMES} names can be read at once")
    for i in range(count):
        name = wanted[i]
        if not isinstance(name, bytes):
            raise TypeError("names must be bytes")
        names[i].text = PyBytes_AS_STRING(name)
        names[i].length = PyBytes_GET_SIZE(name)
        names[i].total = 0
        names[i].found = False
    return count


cdef tuple results(Name* names, Py_ssize_t count):
    return tuple([names[i].total if names[i].found else None for i in range(count)])


def parse_counters(bytes data not None, tuple names not None):
    cdef Name wanted[MAX_NAMES]
    cdef Py_ssize_t count = prepare(names, wanted)
    cdef const char* text = PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    with nogil:
        parse(text, size, wanted, count)
    return results(wanted, count)


def read_counters(int fd, tuple names not None):
    cdef Name wanted[MAX_NAMES]
    cdef char buffer[BUFFER_BYTES]
    cdef Py_ssize_t count = prepare(names, wanted)
    cdef Py_ssize_t size
    cdef int error = 0
    with nogil:
        size = read_all(fd, buffer)
        if size < 0:
            error = errno
        elif size < BUFFER_BYTES:
            parse(buffer, size, wanted, count)
    if error != 0:
        raise OSError(error, os.strerror(error))
    if size == BUFFER_BYTES:
        raise ValueError(f"the file of descriptor {fd} is longer than {MAX_FILE_BYTES} bytes")
    return results(wanted, count)
