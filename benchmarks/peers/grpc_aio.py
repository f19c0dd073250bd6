"""A bare ``grpc.aio`` server: bytes in, bytes out, without a protobuf message around them; a process a worker, all on
one port (SO_REUSEPORT).

    PEER_RELEASE=… PEER_WORKERS=2 PEER_MAX_BATCH=32 python benchmarks/peers/grpc_aio.py PORT
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import sys
from typing import Any

import grpc
from stages import Batcher, max_batch, workers

SERVICE, METHOD = "trirank.Ranker", "Rank"


async def serve(port: int) -> None:
    """Until SIGTERM."""
    batcher = Batcher(max_batch())
    await batcher.start()

    async def rank(body: bytes, context: Any) -> bytes:
        return await batcher(body)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    handlers = {METHOD: grpc.unary_unary_rpc_method_handler(rank)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(1)


def worker(port: int) -> None:
    """One process."""
    asyncio.run(serve(port))


def main() -> None:
    """Serve until SIGTERM."""
    port = int(sys.argv[1])
    processes = [multiprocessing.get_context("spawn").Process(target=worker, args=(port,)) for _ in range(workers())]
    for process in processes:
        process.start()
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes] and None)
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
