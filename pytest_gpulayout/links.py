"""Link classes, from best to worst, and the requirement that a layout can make on them.

Link classes are those of ``nvidia-smi topo -m``: ``NV#`` (# bonded NVLinks), ``PIX``, ``PXB``, ``PHB``, ``NODE``,
``SYS``. AMD's tools print ``XGMI`` (their NVLink) and ``PCIE`` (some PCIe path, which may cross sockets). NCCL's path
types (NVL, PXN, ...) are another vocabulary and do not appear here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import total_ordering

from pytest_gpulayout.errors import LayoutSyntaxError

_WORST_TO_BEST = ("SYS", "PCIE", "NODE", "PHB", "PXB", "PIX", "XGMI", "NV")
_FORMER_NAMES = {"SOC": "SYS"}
_LINK_CLASS = re.compile(r"(?P<name>NV)(?P<nvlinks>[1-9][0-9]*)|(?P<other>[A-Z]+)")


@total_ordering
@dataclass(frozen=True, slots=True)
class LinkClass:
    """How two devices are connected; ``a > b`` means that ``a`` is the better link.

    :param name: ``NV``, ``XGMI``, ``PIX``, ``PXB``, ``PHB``, ``NODE``, ``PCIE`` or ``SYS``.
    :param nvlinks: number of bonded NVLinks, 0 for other classes.
    :param printed: the cell as it was printed, where it differs: drivers before 2018 say ``SOC`` for ``SYS``.
    """

    name: str
    nvlinks: int = 0
    printed: str | None = field(default=None, compare=False)

    @property
    def is_nvlink(self) -> bool:
        """Whether the link is made of NVLinks."""
        return self.name == "NV"

    @property
    def quality(self) -> int:
        """A number that is larger for a better link; its differences mean nothing."""
        return _WORST_TO_BEST.index(self.name) + 1 + self.nvlinks

    def __lt__(self, other: LinkClass) -> bool:
        return self.quality < other.quality

    def __str__(self) -> str:
        if self.printed is not None:
            return self.printed
        return f"NV{self.nvlinks}" if self.is_nvlink else self.name


def parse_link_class(text: str) -> LinkClass:
    """Read a cell such as ``NV12`` or ``PHB``.

    :raises LayoutSyntaxError: the text is not a link class.
    """
    match = _LINK_CLASS.fullmatch(text)
    if match and match["name"]:
        return LinkClass("NV", int(match["nvlinks"]))
    name = _FORMER_NAMES.get(text, text)
    if name not in _WORST_TO_BEST or name == "NV":
        raise LayoutSyntaxError(text, 1, "link class: expected NV#, PIX, PXB, PHB, NODE, SYS, XGMI or PCIE")
    return LinkClass(name, printed=text if text != name else None)


@dataclass(frozen=True, slots=True)
class LinkRequirement:
    """The class that the worst link between communicating devices must reach.

    :param text: canonical form, as a user types it.
    :param least: the worst class that is good enough; ``None`` accepts everything, an unknown link too.
    """

    text: str
    least: LinkClass | None

    def accepts(self, link: LinkClass | None) -> bool:
        """Return whether a link of this class, ``None`` for unknown, is good enough."""
        return self.least is None or (link is not None and link >= self.least)

    @property
    def needs_nvlink(self) -> bool:
        """Whether nothing but NVLink is good enough."""
        return self.least is not None and self.least.is_nvlink

    def __str__(self) -> str:
        return self.text


_REQUIREMENTS = {
    "nvlink": LinkClass("NV", 1),
    "pix": LinkClass("PIX"),
    "pxb": LinkClass("PXB"),
    "phb": LinkClass("PHB"),
    "node": LinkClass("NODE"),
    "any": None,
}


def parse_requirement(text: str) -> LinkRequirement:
    """Read ``nvlink``, ``nvN`` (at least N NVLinks), ``pix``, ``pxb``, ``phb``, ``node`` or ``any``, in any case.

    :raises LayoutSyntaxError: with the column of the first character that does not fit.
    """
    word = text.lower()
    if word in _REQUIREMENTS:
        return LinkRequirement(word, _REQUIREMENTS[word])
    known = next((name for name in _REQUIREMENTS if word.startswith(name)), None)
    if known is not None:
        column = len(known) + 1
        raise LayoutSyntaxError(text, column, f"link requirement: expected nothing after {known!r}")
    if not word.startswith("nv"):
        raise LayoutSyntaxError(
            text, 1, f"link requirement: expected nvlink, nvN, pix, pxb, phb, node or any, found {text!r}"
        )
    digits = re.match(r"[1-9][0-9]*", word[2:], re.ASCII)
    if digits is None or digits.end() < len(word) - 2:
        column = 3 + (digits.end() if digits else 0)
        raise LayoutSyntaxError(
            text, column, "link requirement: expected a number of NVLinks after 'nv', such as nv4"
        )
    return LinkRequirement(word, LinkClass("NV", int(digits.group())))
