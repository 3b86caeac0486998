"""Flow control of every gRPC connection of ours: how much a stream that nobody reads keeps in memory."""

__all__ = ["STREAM_BYTES", "STREAM_OPTIONS"]

STREAM_BYTES = 256 << 10
"""What may come on one stream before its reader has taken it. A larger message comes whole for who waits for it."""

STREAM_OPTIONS: tuple[tuple[str, int], ...] = (
    # Else gRPC widens the window of all streams by what a fast one could use, to megabytes for each that stands still.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", STREAM_BYTES),
)
