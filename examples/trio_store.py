"""Receive messages under trio and store each one: threads write, and a nursery keeps the tasks together.

A memory channel brings messages of any length from three producers. Four workers allocate a range for each and
`trio.to_thread.run_sync` writes it. If a task fails, trio cancels the others, and what has a receipt stays.
"""

import sys
import tempfile
from pathlib import Path

import trio

import blockstore as bs

PRODUCERS, MESSAGES, WORKERS = 3, 40, 4


def message(producer: int, number: int) -> bytes:
    """What a producer has to say: longer every time."""
    return f"producer {producer}, message {number}\n".encode() * (1 + number * 7)


async def produce(channel: trio.MemorySendChannel[tuple[int, bytes]], producer: int) -> None:
    async with channel:
        for number in range(MESSAGES):
            await channel.send((producer * MESSAGES + number, message(producer, number)))


async def store_all(store: bs.BlockStore, channel: trio.MemoryReceiveChannel[tuple[int, bytes]]) -> None:
    async with channel:
        async for tag, data in channel:
            r = store.allocate(len(data), tag=tag)
            await trio.to_thread.run_sync(r.write, data)


async def main(path: Path) -> None:
    """Store the messages of all producers in `path`, in the order in which they come."""
    nbytes = sum(bs.align_up(len(message(p, n))) for p in range(PRODUCERS) for n in range(MESSAGES))
    with bs.create(path, nbytes, allocator="concurrent", access="dense", overwrite=True) as store:
        async with trio.open_nursery() as nursery:
            sender, receiver = trio.open_memory_channel[tuple[int, bytes]](WORKERS)
            async with sender, receiver:
                for producer in range(PRODUCERS):
                    nursery.start_soon(produce, sender.clone(), producer)
                for _ in range(WORKERS):
                    nursery.start_soon(store_all, store, receiver.clone())
        durable = await trio.to_thread.run_sync(store.flush)
        print(f"{durable} messages are durable, {store.receipts()['nbytes'].sum()} bytes, {store.free} bytes are left")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trio.run(main, Path(sys.argv[1] if sys.argv[1:] else f"{folder}/messages.bin"))
