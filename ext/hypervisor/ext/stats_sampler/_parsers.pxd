"""Native parsers, one a format; ``_parsers_py`` specifies them. All read only ``data[0:size]``: every index is checked
against ``size`` before it is used. ``out`` has room for ``kind.count`` values; -1 is one that is not there."""

from libc.stdint cimport INT64_MAX, int64_t
from libc.string cimport memchr, memcmp

cdef enum:
    NUMBER = 0
    KEYED = 1
    KEYED_FROM_ZERO = 2
    PRESSURE = 3
    NET_DEV = 4

    MAX_KEYS = 8
    MAX_NAME = 24

cdef struct Key:
    char name[MAX_NAME]
    Py_ssize_t length
    int value
    int64_t scale

cdef struct Kind:
    int format
    int count
    bint slow
    bint vital
    Key keys[MAX_KEYS]


cdef inline bint is_separator(char byte) noexcept nogil:
    return byte == 32 or byte == 9 or byte == 61  # blank, tab, '='


cdef inline bint ends_word(char byte) noexcept nogil:
    return byte == 32 or byte == 9 or byte == 61 or byte == 10


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
        if i < 18:
            value = value * 10 + digit
        elif value > (INT64_MAX - digit) // 10:
            value = INT64_MAX
        elif value != INT64_MAX:
            value = value * 10 + digit
    return value


cdef inline void add(int64_t* total, int64_t value) noexcept nogil:
    """Add to a total of which -1 says that there is none yet; saturates."""
    if total[0] < 0:
        total[0] = value
    elif value > INT64_MAX - total[0]:
        total[0] = INT64_MAX
    else:
        total[0] += value


cdef inline void parse_number(const char* data, Py_ssize_t size, int64_t* out) noexcept nogil:
    cdef Py_ssize_t at = 0, start
    while at < size and ends_word(data[at]):
        at += 1
    start = at
    while at < size and not ends_word(data[at]):
        at += 1
    out[0] = value_of(data + start, at - start) if at > start else -1


cdef inline void parse_pairs(
    const char* data, Py_ssize_t size, const Kind* kind, bint pressure, int64_t* out
) noexcept nogil:
    """KEYED, or with ``pressure`` PRESSURE: there the word before is ``total``, and the name the first of the line."""
    cdef Py_ssize_t at = 0, start, length, before = 0, before_length = 0, name = 0, name_length = 0
    cdef int64_t value
    cdef int i
    for i in range(kind.count):
        out[i] = -1
    while at < size:
        if data[at] == 10:
            before_length = name_length = 0
            at += 1
            continue
        if is_separator(data[at]):
            at += 1
            continue
        start = at
        while at < size and not ends_word(data[at]):
            at += 1
        length = at - start
        if before_length == 0:
            name = start
            name_length = length
        elif not pressure:
            name = before
            name_length = before_length
        if before_length > 0 and (
            not pressure or (before_length == 5 and memcmp(data + before, b"total", 5) == 0)
        ):
            for i in range(kind.count):
                if kind.keys[i].length == name_length and memcmp(kind.keys[i].name, data + name, name_length) == 0:
                    value = value_of(data + start, length)
                    if value >= 0:
                        add(&out[i], value)
        before = start
        before_length = length


cdef inline bint is_loopback(const char* name, Py_ssize_t length) noexcept nogil:
    while length > 0 and is_separator(name[0]):
        name += 1
        length -= 1
    while length > 0 and is_separator(name[length - 1]):
        length -= 1
    return length == 2 and name[0] == 108 and name[1] == 111  # lo


cdef inline void parse_net_dev(const char* data, Py_ssize_t size, int64_t* out) noexcept nogil:
    """``out`` has four values."""
    cdef Py_ssize_t at = 0, end, start, column
    cdef const char* found
    cdef const char* colon
    cdef int64_t values[4]
    cdef int wanted, i
    for i in range(4):
        out[i] = -1
    while at < size:
        found = <const char*> memchr(data + at, 10, size - at)
        end = size if found == NULL else found - data
        colon = <const char*> memchr(data + at, 58, end - at) if end > at else NULL
        if colon != NULL:
            start = colon - data + 1
            column = wanted = 0
            while wanted < 4:
                while start < end and is_separator(data[start]):
                    start += 1
                if start >= end:
                    break
                found = data + start
                while start < end and not is_separator(data[start]):
                    start += 1
                if column < 2 or column >= 8:
                    values[wanted] = value_of(found, data + start - found)
                    if values[wanted] < 0:
                        break
                    wanted += 1
                column += 1
            if wanted == 4:
                for i in range(4):
                    if out[i] < 0:
                        out[i] = 0
                    if not is_loopback(data + at, colon - data - at):
                        add(&out[i], values[i])
        at = end + 1


cdef inline void parse_file(const Kind* kind, const char* data, Py_ssize_t size, int64_t* out) noexcept nogil:
    """The values of a file as they stand in it, in the order of its keys."""
    cdef int i
    if kind.format == NUMBER:
        parse_number(data, size, out)
    elif kind.format == NET_DEV:
        parse_net_dev(data, size, out)
    else:
        parse_pairs(data, size, kind, kind.format == PRESSURE, out)
        if kind.format == KEYED_FROM_ZERO:
            for i in range(kind.count):
                if out[i] < 0:
                    out[i] = 0
