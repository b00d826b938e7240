"""How long choosing devices takes: machines with 8, 16 and 72 GPUs, of one kind of link and without any pattern.

    python benchmarks/placement_time.py

Prints the median and the worst of repeated searches, in ms, and whether the placement is proved to be the best.
"""

from __future__ import annotations

import random
import statistics
import time
from itertools import combinations

from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.placement import choose_placement
from pytest_gpulayout.topology import Device, Topology

REPEATS = 5


def machine(count: int, link: str | None) -> Topology:
    """``link`` between any two devices, or links of all classes at random."""
    random_ = random.Random(count)
    classes = ["SYS", "NODE", "PHB", "PIX", "NV1", "NV2", "NV4"]
    return Topology(
        devices=tuple(Device(index=i, numa_node=2 * i // count) for i in range(count)),
        links={pair: parse_link_class(link or random_.choice(classes)) for pair in combinations(range(count), 2)},
        source="benchmark",
        recorded=True,
    )


def main() -> None:
    """Time every machine and layout."""
    print(f"{'machine':24}{'layout':10}{'median ms':>10}{'worst ms':>10}")
    for count, link in ((8, "NV18"), (8, None), (16, "NV6"), (16, None), (72, "NV18"), (72, None)):
        for text in ("tp2", "tp4", "tp8", "tp4pp2", "tp2x4", "tp4pp4", "tp8dp8ep", "tp72"):
            layout = parse_layout(text)
            if layout.gpus > count:
                continue
            topology, times = machine(count, link), []
            for _ in range(REPEATS):
                start = time.perf_counter()
                choose_placement(topology, layout)
                times.append(1000 * (time.perf_counter() - start))
            name = f"{count} GPUs, {link or 'no pattern'}"
            print(f"{name:24}{text:10}{statistics.median(times):10.1f}{max(times):10.1f}", flush=True)


if __name__ == "__main__":
    main()
