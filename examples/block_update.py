"""Update blocks of a file in place, as a database does: read a page, change it, commit.

Each block holds accounts. A transfer rewrites the blocks of both, which voids their receipts until the next flush
makes the new ones durable. A crash halfway can leave one block new and the other old: a real database adds a log.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import blockstore as bs

BLOCKS, ACCOUNTS, BALANCE, TRANSFERS, COMMIT_EVERY = 64, 256, 1000, 2000, 250
ACCOUNT = np.dtype([("balance", "<i8"), ("changes", "<u8")])


def main(path: Path) -> None:
    """Open the accounts in `path`, move money between them at random, and add it all up."""
    nbytes = ACCOUNTS * ACCOUNT.itemsize
    with bs.create(path, BLOCKS * bs.align_up(nbytes), access="sparse", overwrite=True) as store:
        blocks = store.allocate_many(BLOCKS, shape=ACCOUNTS, dtype=ACCOUNT)
        for block in blocks:
            with block.writer() as a:
                a["balance"] = BALANCE
        print(f"opened {BLOCKS * ACCOUNTS} accounts: {store.flush()} blocks are durable")

        rng = np.random.default_rng(1)
        first = blocks[0].receipt
        changed: set[int] = set()
        for number, (source, target) in enumerate(rng.integers(BLOCKS * ACCOUNTS, size=(TRANSFERS, 2)).tolist(), 1):
            for account, amount in ((source, -10), (target, 10)):
                index, slot = divmod(account, ACCOUNTS)
                with blocks[index].writer(rewrite=True) as a:
                    a[slot]["balance"] += amount
                    a[slot]["changes"] += 1
                changed.add(index)
            if number % COMMIT_EVERY == 0:
                store.flush(receipt for index in changed if (receipt := blocks[index].receipt))
                changed.clear()

        total = sum(int(block.read()["balance"].sum()) for block in blocks)
        durable = int(store.receipts()["durable"].sum())
        print(f"after {TRANSFERS} transfers: {total} in all accounts, {durable} blocks are durable")
        print(f"the first receipt of all: {first}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1] if sys.argv[1:] else f"{folder}/accounts.bin"))
