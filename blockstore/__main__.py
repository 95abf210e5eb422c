"""``python -m blockstore``: see `blockstore.cli`."""

import sys

from blockstore.cli import main

if __name__ == "__main__":
    sys.exit(main())
