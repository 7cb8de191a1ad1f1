"""``python -m tensorspark``."""

from __future__ import annotations

import sys

from tensorspark.cli import main

if __name__ == "__main__":
    sys.exit(main())
