"""What all tests share: pytest inside pytest, and the options for tests that need more than any machine has."""

from __future__ import annotations

import signal
from importlib.util import find_spec

import pytest

pytest_plugins = ["pytester"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what ends in "&" so, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """One form of an inner run's output everywhere: in a CI pytest prints its summary in full, or in colour."""
    for name in ("CI", "BUILD_NUMBER", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "PYTEST_ADDOPTS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-gpu", action="store_true", help="run the tests marked gpu, which need an NVIDIA GPU")
    parser.addoption("--require-vllm", action="store_true", help="fail, not skip, where vLLM is not installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_vllm = find_spec("vllm") is None
    if no_vllm and config.getoption("--require-vllm"):
        raise pytest.UsageError("--require-vllm: vLLM is not installed; make install-cpu installs its CPU build")
    for item in items:
        if item.get_closest_marker("gpu") is not None and not config.getoption("--run-gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: run with --run-gpu"))
        if item.get_closest_marker("real_vllm") is not None and no_vllm:
            item.add_marker(pytest.mark.skip(reason="needs vLLM's CPU build: make install-cpu"))
