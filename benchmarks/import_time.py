"""Import time."""


class ImportTime:
    """How long does ``import blockstore`` take in a new process? The floor is ``import numpy``, which it needs."""

    rounds = 2
    repeat = (5, 10, 5.0)
    number = 1
    warmup_time = 0.0

    def timeraw_import_blockstore(self) -> str:
        return "import blockstore"

    def timeraw_floor_import_numpy(self) -> str:
        return "import numpy"
