"""Whether a run's numbers may be used: each way in which they can be wrong without looking wrong, by name.

Knows the rules and their limits. Leaves collecting the facts to the load driver and the observers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProblemKind = Literal[
    "failed-requests",
    "token-counts",
    "client-bound",
    "prefix-cache",
    "jit-compilation",
    "throttled",
    "foreign-process",
    "unstable",
    "too-few-samples",
    "several-servers",
    "unfit-metrics",
]
"""What is wrong with a run; ``docs/measuring.md`` says how each is found and what to do."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a run's numbers must be neither judged nor stored.

    :param text: a sentence with the numbers, and what to do.
    """

    kind: ProblemKind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"
