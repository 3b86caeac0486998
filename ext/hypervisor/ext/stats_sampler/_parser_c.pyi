"""Native twin of _parser_py: the same names, the same behaviour; reads and parses without the GIL."""

UNLIMITED: int
MAX_FILE_BYTES: int

def parse_counters(data: bytes, names: tuple[bytes, ...]) -> tuple[int | None, ...]: ...
def read_counters(fd: int, names: tuple[bytes, ...]) -> tuple[int | None, ...]: ...
