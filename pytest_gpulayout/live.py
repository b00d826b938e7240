"""The line that moves while a server loads or load runs."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

_INTERVAL_S = 0.2
_INTERVAL_WITHOUT_TERMINAL_S = 30.0


class LiveLine:
    """Writes to pytest's terminal even while output is captured.

    On a terminal one line is rewritten; elsewhere (CI logs) a line is printed now and then. In a worker of
    pytest-xdist there is no terminal, and nothing is shown.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager
        self._shown_at = float("-inf")
        self._on_line = False
        self._last = ""

    @property
    def _reporter(self) -> Any:
        """Looked up when needed: pytest registers its terminal reporter after our configuration."""
        return self._plugins.get_plugin("terminalreporter")

    def update(self, text: str) -> None:
        """Show what is going on now; called as often as the caller likes."""
        now = time.monotonic()
        reporter = self._reporter
        terminal = reporter is not None and reporter.isatty
        interval = _INTERVAL_S if terminal else _INTERVAL_WITHOUT_TERMINAL_S
        if reporter is None or now - self._shown_at < interval or text == self._last:
            return
        self._shown_at, self._last = now, text
        if terminal:
            self._write(f"\r\x1b[2K{text[: reporter._tw.fullwidth - 1]}", line=False)
        else:
            self._write(text, line=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._reporter is not None:
            self.clear()
            self._write(text, line=True)
            self._shown_at = time.monotonic()

    def clear(self) -> None:
        """Remove the moving line, before pytest writes again."""
        if self._on_line:
            with self._uncaptured():
                self._reporter._tw.write("\r\x1b[2K", flush=True)
            self._on_line = False

    def _write(self, text: str, *, line: bool) -> None:
        with self._uncaptured():
            if not self._on_line:
                self._reporter.ensure_newline()
            if line:
                self._reporter.write_line(text)
            else:
                self._reporter._tw.write(text, flush=True)
        self._on_line = not line

    def _uncaptured(self) -> contextlib.AbstractContextManager[None]:
        capture: Any = self._plugins.get_plugin("capturemanager")
        if capture is None:
            return contextlib.nullcontext()
        manager: contextlib.AbstractContextManager[None] = capture.global_and_fixture_disabled()
        return manager
