"""What vLLM says about its own layout in every response: ``system_fingerprint``.

Format (vLLM 0.32, ``vllm/entrypoints/serve/utils/fingerprint.py``, mode ``full``)::

    vllm-<version>[-tpN][-ppN][-dpN][-ep]-<8 characters of the configuration's hash, or "nohash">

Sizes of 1 are left out; pcp and dcp do not appear. Mode ``hash`` leaves all sizes out and so looks like ``tp1``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_gpulayout.layout import Layout

_FULL = re.compile(
    r"vllm-(?P<version>.+?)(?:-tp(?P<tp>\d+))?(?:-pp(?P<pp>\d+))?(?:-dp(?P<dp>\d+))?(?P<ep>-ep)?"
    r"-(?P<hash>[0-9a-z]{6,8})"
)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A fingerprint in its parts. :param config_hash: changes with anything that changes the computation."""

    version: str
    tp: int
    pp: int
    dp: int
    ep: bool
    config_hash: str

    def contradiction(self, layout: Layout) -> str | None:
        """Say where this server differs from ``layout``, or ``None`` when it is that layout."""
        told = Layout(tp=self.tp, pp=self.pp, dp=self.dp, ep=self.ep)
        wanted = Layout(tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.ep)
        return None if told == wanted else f"the server says it is {told}, {wanted} was asked for"


def parse_fingerprint(text: str) -> Fingerprint | None:
    """Read a fingerprint; ``None`` when it does not have vLLM's form (mode ``custom``, other servers)."""
    match = _FULL.fullmatch(text)
    if match is None:
        return None
    tp, pp, dp = (int(match[name] or 1) for name in ("tp", "pp", "dp"))
    return Fingerprint(match["version"], tp, pp, dp, match["ep"] is not None, match["hash"])
