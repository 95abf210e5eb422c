"""Do one job: ``python -m compat.readers JOB``."""

import json
import sys
from pathlib import Path

from compat.readers import work

if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
