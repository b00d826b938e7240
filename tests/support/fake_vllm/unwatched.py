"""A pytest plugin that lets our client measure unwatched: tests run side by side, and would see each other's load."""

from __future__ import annotations

from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver


def pytest_gpulayout_load_driver() -> OpenAiStreamDriver:
    return OpenAiStreamDriver()
