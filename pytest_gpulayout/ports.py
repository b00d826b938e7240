"""What the gate needs from the outside world, as Protocols; :mod:`pytest_gpulayout.adapters` implements them.

Nothing here opens a file, socket or process. Public fakes for every port are in :mod:`pytest_gpulayout.testing`.
"""
