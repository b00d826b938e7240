"""Everything this package raises on purpose.

::

    GpuLayoutError
    ├── LayoutSyntaxError        text of a layout or requirement that cannot be read (text, column)
    ├── MarkerError              a marker whose arguments do not fit
    ├── UnsupportedLayoutError   a valid layout that this version does not start
    ├── TopologyError            devices could not be listed, or are too few
    │   └── TopologyFormatError  a recorded topology that cannot be read (source, line, column)
    ├── PlanError                a machine or a demand that no plan can be made for
    │   ├── ModelConfigError     a config.json that cannot be read, or whose model cannot be counted
    │   └── UnknownGpuError      a GPU whose data sheet is not known
    ├── WorkloadError            a workload that is unknown or does not make sense
    ├── LinkError                links between devices are worse than required
    ├── EvidenceError            NCCL or vLLM logs that cannot be read
    ├── BaselineError
    │   ├── BaselineNotFound     nothing is stored under the key
    │   ├── BaselineCorrupt      a file that is not the document its schema describes
    │   └── BaselineForeign      a file whose key is not the key that was asked for
    ├── ServerError              command, exit code and the end of the server's log come along
    │   ├── ServerStartFailed
    │   ├── ServerStartTimeout
    │   ├── DevicesBusy          others compute on the devices that it was to start on
    │   ├── ServerExited         it was ready, and then went away
    │   └── NodeError            a host of a layout over several cannot do its part (node)
    │       └── NodeLost         it does not answer any more
    └── MeasurementError         no samples, or requests that failed

A message has four parts: what was required, what was found, where, and what to type next. An exception is
the absence of a verdict; "the link is PHB and NVLink was required" is a value, not an exception.
"""

from __future__ import annotations

from collections.abc import Sequence


class GpuLayoutError(Exception):
    """Base of all errors of this package; its text is complete without a traceback."""


class LayoutSyntaxError(GpuLayoutError):
    """A layout (or link requirement) that does not follow its grammar.

    :param text: what was to be read.
    :param column: 1-based column of the first character that does not fit.
    :param reason: what was expected there.
    """

    def __init__(self, text: str, column: int, reason: str) -> None:
        self.text = text
        self.column = column
        self.reason = reason
        super().__init__(f"{reason}\n  {text}\n  {' ' * (column - 1)}^ column {column}")


class MarkerError(GpuLayoutError):
    """A marker whose arguments cannot be used."""


class UnsupportedLayoutError(GpuLayoutError):
    """A layout that is well formed, but that this version cannot start."""


class TopologyError(GpuLayoutError):
    """The devices or the links between them could not be determined."""


class TopologyFormatError(TopologyError):
    """A recorded topology that cannot be read without guessing.

    :param source: file name or ``"<text>"``.
    :param line: 1-based line, 0 when the file as a whole is meant.
    :param column: 1-based column, 0 when the line as a whole is meant.
    """

    def __init__(self, reason: str, *, source: str, line: int = 0, column: int = 0) -> None:
        self.source = source
        self.line = line
        self.column = column
        place = source + (f", line {line}" if line else "") + (f", column {column}" if column else "")
        super().__init__(f"{reason}\n  in {place}")


class LinkError(GpuLayoutError):
    """Links between devices that communicate are worse than required; raised by ``assert_links`` alone."""


class PlanError(GpuLayoutError):
    """A machine or a demand that no plan can be made for."""


class ModelConfigError(PlanError):
    """A model's config.json that cannot be read, or whose model cannot be counted."""


class UnknownGpuError(PlanError):
    """A GPU that is not in the table of data sheets."""


class WorkloadError(GpuLayoutError):
    """A workload that is unknown, or whose numbers do not fit together."""


class EvidenceError(GpuLayoutError):
    """A log that should hold evidence, and cannot be read."""


class BaselineError(GpuLayoutError):
    """A stored baseline that cannot be used; :attr:`path` says which."""

    def __init__(self, message: str, *, path: str) -> None:
        self.path = path
        super().__init__(message)


class BaselineNotFound(BaselineError):
    """Nothing is stored under this key."""


class BaselineCorrupt(BaselineError):
    """The file is not JSON, or not the document its schema describes."""


class BaselineForeign(BaselineError):
    """The file belongs to another key than the one that was asked for."""


class ServerError(GpuLayoutError):
    """A vLLM server that did not do what was needed.

    :param message: one sentence, the cause first.
    :param command: the argument list, without secrets.
    :param exit_code: of the server's main process, ``None`` while it runs; negative for a signal.
    :param log_tail: last lines of the server's log, newest last.
    """

    def __init__(
        self,
        message: str,
        *,
        command: Sequence[str] = (),
        exit_code: int | None = None,
        log_tail: Sequence[str] = (),
    ) -> None:
        self.command = tuple(command)
        self.exit_code = exit_code
        self.log_tail = tuple(log_tail)
        super().__init__(message)


class ServerStartFailed(ServerError):
    """The server went away, or proved to be something else, before it was ready."""


class ServerStartTimeout(ServerError):
    """The server was not ready in the time it was given."""


class DevicesBusy(ServerError):
    """Others compute on the devices of a server that was to be started. :param pids: their process ids."""

    def __init__(self, message: str, *, pids: Sequence[int]) -> None:
        self.pids = tuple(pids)
        super().__init__(message)


class ServerExited(ServerError):
    """A server that had been ready is gone."""


class NodeError(ServerError):
    """A host of a layout over several nodes cannot do its part. :param node: as the user named it."""

    def __init__(self, message: str, *, node: str) -> None:
        self.node = node
        super().__init__(message)


class NodeLost(NodeError):
    """A node that had answered does not answer any more."""


class MeasurementError(GpuLayoutError):
    """A measurement without samples, or with requests that failed."""
