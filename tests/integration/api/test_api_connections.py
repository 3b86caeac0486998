"""Connections to the API that carry no call: agents keep them and ask now and then whether the server is there."""

import asyncio

import grpc
import grpc.aio

from hypervisor.server.api.service import make_server

_WATCHED_S = 5.0
"""gRPC asks at most once a second, whatever it is told; where that is not permitted the third time is too much."""


async def test_a_client_that_pings_without_a_call_is_not_turned_away() -> None:
    server, port = make_server(
        "127.0.0.1:0",
        credentials=None,
        max_message_bytes=1 << 20,
        max_concurrent_calls=10,
        extra_options=(("grpc.http2.min_ping_interval_without_data_ms", 50),),
    )
    await server.start()
    channel = grpc.aio.insecure_channel(
        f"127.0.0.1:{port}",
        options=(
            ("grpc.keepalive_time_ms", 200),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ),
    )
    try:
        async with asyncio.timeout(10):
            await channel.channel_ready()

        left = asyncio.create_task(channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        done, _ = await asyncio.wait({left}, timeout=_WATCHED_S)

        left.cancel()
        assert not done, f"the connection became {channel.get_state()}"
    finally:
        await channel.close()
        await server.stop(None)
