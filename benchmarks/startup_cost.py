"""What the plugin costs a pytest run that does not ask for a layout.

Runs ``pytest`` on one empty test with the plugin and without it (``-p no:gpulayout``), interleaved, in a folder of
its own, and prints the medians, their difference and its spread. Usage: python benchmarks/startup_cost.py
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

LIMIT_MS = 15.0


def run_ms(folder: Path, *arguments: str) -> float:
    """Wall time of one pytest process, in milliseconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return (time.perf_counter() - started) * 1000


def main() -> int:
    """Measure and print; the exit code is 1 when the limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds: int = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_empty.py").write_text("def test_nothing():\n    pass\n")
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds + 2):
            order = [True, False]
            random.shuffle(order)
            for with_plugin in order:
                elapsed = run_ms(folder, *([] if with_plugin else ["-p", "no:gpulayout"]))
                if number >= 2:  # the first rounds fill the page cache
                    times[with_plugin].append(elapsed)
    pairs = [with_plugin - without for with_plugin, without in zip(times[True], times[False], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    cost = statistics.median(times[True]) - statistics.median(times[False])
    print(f"{platform.processor() or platform.machine()}, {datetime.now(UTC):%Y-%m-%d}")
    print(f"Python {platform.python_version()}, pytest {version('pytest')}, {rounds} interleaved rounds")
    print(f"with the plugin    {statistics.median(times[True]):7.1f} ms (median)")
    print(f"without            {statistics.median(times[False]):7.1f} ms (median)")
    print(f"cost               {cost:7.1f} ms; pairwise quartiles {quartiles[0]:+.1f} to {quartiles[2]:+.1f} ms")
    print(f"limit              {LIMIT_MS:7.1f} ms: {'kept' if cost < LIMIT_MS else 'BROKEN'}")
    return 0 if cost < LIMIT_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
