"""The frames of viewers: encoder and decoder; see frames.py and _decoder_py.py, whose behaviour this has."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from hypervisor.ext.console_mux._os cimport htole16, htole32, htole64, le16toh, le32toh, le64toh

cdef enum:
    HEADER_BYTES = 16
    MAX_DATA_BYTES = 65536
    MAX_INPUT_BYTES = 4096

cdef enum FrameKind:
    FRAME_DATA = 1
    FRAME_SKIPPED = 2
    FRAME_ENDED = 3
    FRAME_INPUT_DONE = 4
    FRAME_INPUT_READY = 5
    FRAME_INPUT = 16
    FRAME_RESIZE = 17
    FRAME_CREDIT = 18

cdef enum InputAnswer:
    INPUT_ACCEPTED = 0
    INPUT_FULL = 1
    INPUT_READ_ONLY = 2
    INPUT_NO_GUEST = 3

cdef enum DecoderResult:
    DECODER_NO_MEMORY = -2
    DECODER_ERROR = -1
    DECODER_MORE = 0
    DECODER_FRAME = 1

cdef struct FrameHeader:
    unsigned char kind
    unsigned char zero
    uint16_t code
    uint32_t length
    uint64_t position

cdef struct DecoderData:
    bint from_viewer
    bint failed
    bint given             # the frame that is kept was handed out: the next call forgets it
    uint32_t used          # bytes of it that came, header included
    char header[16]
    char* payload
    FrameHeader frame


cdef inline void frame_put(char* to, int kind, int code, uint32_t length, uint64_t position) noexcept nogil:
    """Write the 16 bytes of a header."""
    cdef uint16_t code_le = htole16(<uint16_t>code)
    cdef uint32_t length_le = htole32(length)
    cdef uint64_t position_le = htole64(position)
    to[0] = <char>kind
    to[1] = 0
    memcpy(to + 2, &code_le, 2)
    memcpy(to + 4, &length_le, 4)
    memcpy(to + 8, &position_le, 8)


cdef inline void frame_get(const char* data, FrameHeader* frame) noexcept nogil:
    memcpy(&frame.code, data + 2, 2)
    memcpy(&frame.length, data + 4, 4)
    memcpy(&frame.position, data + 8, 8)
    frame.kind = <unsigned char>data[0]
    frame.zero = <unsigned char>data[1]
    frame.code = le16toh(frame.code)
    frame.length = le32toh(frame.length)
    frame.position = le64toh(frame.position)


cdef inline bint frame_is_legal(const FrameHeader* frame, bint from_viewer) noexcept nogil:
    cdef int kind = frame.kind
    if frame.zero != 0 or (kind >= FRAME_INPUT) != from_viewer:
        return False
    if kind == FRAME_INPUT:
        return frame.length <= MAX_INPUT_BYTES and frame.code == 0 and frame.position == 0
    if frame.position >= (<uint64_t>1) << 63:
        return False
    if kind == FRAME_DATA:
        return 1 <= frame.length and frame.length <= MAX_DATA_BYTES
    if kind == FRAME_SKIPPED:
        return frame.length == 8
    if frame.length != 0:
        return False
    if kind == FRAME_RESIZE:
        return frame.code != 0 and frame.position >= 1 and frame.position <= 0xFFFF
    if kind == FRAME_CREDIT:
        return frame.code == 0 and frame.position >= 1
    return kind == FRAME_ENDED or kind == FRAME_INPUT_DONE or kind == FRAME_INPUT_READY


cdef inline void decoder_init(DecoderData* decoder, bint from_viewer) noexcept nogil:
    decoder.from_viewer = from_viewer
    decoder.failed = decoder.given = False
    decoder.used = 0
    decoder.payload = NULL


cdef inline void decoder_forget(DecoderData* decoder) noexcept nogil:
    free(decoder.payload)
    decoder.payload = NULL
    decoder.used = 0
    decoder.given = False


cdef inline DecoderResult decoder_fail(DecoderData* decoder) noexcept nogil:
    decoder_forget(decoder)
    decoder.failed = True
    return DECODER_ERROR


cdef inline DecoderResult decoder_next(
    DecoderData* decoder, const char** data, size_t* size, const char** payload
) noexcept nogil:
    """Take the next frame out of ``data``, which is moved on.

    ``decoder.frame`` and ``payload`` hold until the next call, which must come before ``data`` goes. Called again until
    it returns DECODER_MORE (all of ``data`` was taken) or an error, after which it only fails.
    """
    cdef size_t part
    if decoder.failed:
        return DECODER_ERROR
    if decoder.given:
        decoder_forget(decoder)
    if decoder.used < HEADER_BYTES:
        part = min(size[0], <size_t>(HEADER_BYTES - decoder.used))
        memcpy(decoder.header + decoder.used, data[0], part)
        decoder.used += <uint32_t>part
        data[0] += part
        size[0] -= part
        if decoder.used < HEADER_BYTES:
            return DECODER_MORE
        frame_get(decoder.header, &decoder.frame)
        if not frame_is_legal(&decoder.frame, decoder.from_viewer):
            return decoder_fail(decoder)
        if size[0] >= decoder.frame.length:
            # The usual case: the payload is there, and is handed on where it lies.
            payload[0] = data[0]
            data[0] += decoder.frame.length
            size[0] -= decoder.frame.length
            decoder.given = True
            return DECODER_FRAME
    if size[0] == 0:
        return DECODER_MORE
    if decoder.payload == NULL:
        decoder.payload = <char*>malloc(decoder.frame.length)
        if decoder.payload == NULL:
            decoder_fail(decoder)
            return DECODER_NO_MEMORY
    part = min(size[0], <size_t>(HEADER_BYTES + decoder.frame.length - decoder.used))
    memcpy(decoder.payload + (decoder.used - HEADER_BYTES), data[0], part)
    decoder.used += <uint32_t>part
    data[0] += part
    size[0] -= part
    if decoder.used < HEADER_BYTES + decoder.frame.length:
        return DECODER_MORE
    payload[0] = decoder.payload
    decoder.given = True
    return DECODER_FRAME


cdef inline size_t decoder_buffered(const DecoderData* decoder) noexcept nogil:
    return 0 if decoder.given else decoder.used
