"""``python -m pytest_gpulayout`` is the command ``gpulayout``."""

from __future__ import annotations

import sys

from pytest_gpulayout.cli import main

if __name__ == "__main__":
    sys.exit(main())
