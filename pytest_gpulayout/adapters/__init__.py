"""Adapters implement the ports of :mod:`pytest_gpulayout.ports` with real hardware, processes and files."""
