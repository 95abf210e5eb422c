"""The machine that the numbers are of. ``python -m benchmarks.machine`` prints the name that asv files them under.

The name is made of what decides the speed, not of the host name, so that the history goes on when the host is new.
"""

import os
import platform
import re
from pathlib import Path


def cpu() -> str:
    """Return the model of the processor, as the system calls it."""
    try:
        found = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def name() -> str:
    """Return a file name for the machine, such as ``amd-epyc-2-cpus``."""
    plain = re.sub(r"\((r|tm)\)|@.*", "", cpu().lower())
    return "-".join([*re.findall(r"[a-z0-9.]+", plain), str(os.cpu_count()), "cpus"])


if __name__ == "__main__":
    print(name())
