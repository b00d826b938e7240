"""What is gated of a baseline, and what noise is assumed of it: the numbers of a server, or those of its links.

A key tells which of the two it is, so that whoever reads stored files need not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_gpulayout import collectives, judging
from pytest_gpulayout.workload import PROBE

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import BaselineKey
    from pytest_gpulayout.stats import NoisePrior
    from pytest_gpulayout.tolerance import Tolerance


def is_of_links(key: BaselineKey) -> bool:
    """Whether a key is that of a probe of the links."""
    return bool(key.workload["name"] == PROBE)


def documented_prior(key: BaselineKey) -> NoisePrior:
    """Return what is assumed of the noise as long as too little is stored."""
    priors = collectives.NOISE_PRIORS if is_of_links(key) else judging.NOISE_PRIORS
    return priors[key.hardware["platform"]]


def gated_of(key: BaselineKey, tolerances: Mapping[str, Tolerance]) -> dict[str, Tolerance]:
    """Return the gated metrics of a key. :param tolerances: as a user named them, for all keys."""
    choose = collectives.probe_tolerances if is_of_links(key) else collectives.serving_tolerances
    return choose(tolerances)
