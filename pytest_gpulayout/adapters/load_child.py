"""What a worker process of the load client runs: ``python -m pytest_gpulayout.adapters.load_child FD``.

Knows the file descriptor of its channel. Leaves everything else to :mod:`~pytest_gpulayout.adapters.load_process`.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from pytest_gpulayout.adapters.load_process import serve

if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as channel:
        serve(channel)
