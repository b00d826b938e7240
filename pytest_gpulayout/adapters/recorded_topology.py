"""A topology from a file: the JSON of ``gpulayout topo --json``, or the text of ``nvidia-smi topo -m``."""

from __future__ import annotations

import json
from pathlib import Path

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.topology import Topology
from pytest_gpulayout.topology_document import topology_from_document
from pytest_gpulayout.topology_text import parse_topology_text

_LARGEST_BYTES = 16 * 1024 * 1024
"""A job log with a listing in it is smaller; a core dump given by mistake is not read into memory."""

_ADVICE = "  record one with: gpulayout topo --json > topology.json, or nvidia-smi topo -m > topology.txt"


class RecordedTopology:
    """Reads the file anew on each probe; the result says that it is recorded and names the file."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def probe(self) -> Topology:
        """Return what the file says.

        :raises TopologyFormatError: the file is missing, not text, or not a topology.
        """
        text = self._read()
        if not text.lstrip().startswith("{"):
            return parse_topology_text(text, self._path.name)
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise TopologyFormatError(
                f"a JSON document was expected, found a fault in it: {error.msg}\n{_ADVICE}",
                source=self._path.name,
                line=error.lineno,
                column=error.colno,
            ) from error
        return topology_from_document(document, self._path.name)

    def _read(self) -> str:
        try:
            with self._path.open("rb") as file:
                data = file.read(_LARGEST_BYTES + 1)
        except OSError as error:
            raise self._error(f"a recorded topology was expected, found none: {error.strerror}") from error
        if len(data) > _LARGEST_BYTES:
            raise self._error(f"a topology of at most {_LARGEST_BYTES >> 20} MiB was expected, found a larger file")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._error(f"text in UTF-8 was expected, found byte {data[error.start]:#04x}") from error
        if "\0" in text or not text.strip():
            raise self._error(f"text was expected, found {'binary data' if text.strip() else 'an empty file'}")
        return text

    def _error(self, reason: str) -> TopologyFormatError:
        return TopologyFormatError(f"{reason}\n{_ADVICE}", source=str(self._path))
