"""Runs an agent whose locks on devices lie in its own temporary folder, so that tests wait for nobody else's.

``own_locks.py PYTHON -P -m MODULE`` runs the module in this process.
"""

from __future__ import annotations

import runpy
import sys
import tempfile

from pytest_gpulayout.adapters import device_lock

device_lock.LOCK_FOLDER = tempfile.gettempdir()
runpy.run_module(sys.argv[-1], run_name="__main__", alter_sys=True)
