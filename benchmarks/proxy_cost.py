"""What the nginx in front of replicas adds to what a client sees, and whether it holds pieces of answers back.

The load client measures the built-in mock, which knows when it sent every chunk, directly and through nginx as
``xN`` starts it, in turn. What the client reports, less what the mock did, is printed for both. From the repository's
root, with nginx installed::

    .venv/bin/python benchmarks/proxy_cost.py --streams 16,100,250 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic_ns

from pytest_gpulayout.adapters.calibrator import calibration_workload, running_mock
from pytest_gpulayout.adapters.cpu_host import cpu_model
from pytest_gpulayout.adapters.device_lock import LentLocks
from pytest_gpulayout.adapters.host import usable_cores, utc_now
from pytest_gpulayout.adapters.nginx_proxy import NginxProxy, find_nginx
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.adapters.vllm_process import free_port
from pytest_gpulayout.calibration import Calibration, compare_run
from pytest_gpulayout.ports import Endpoint

_TTFT_MS = _ITL_MS = 20.0
_FIELDS = ("median_ttft_error_ms", "p99_ttft_error_ms", "median_itl_error_ms", "p99_itl_error_ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="16,100", help="requests in flight, a list")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{utc_now()}, {find_nginx().version}, {cpu_model()}, {usable_cores()} cores")
    print(f"client - mock in ms, median of {arguments.rounds} rounds; TTFT and ITL of the mock {_TTFT_MS:g} ms")
    print(f"{'streams':>7}  {'way':10}" + "".join(f"  {field:>20}" for field in _FIELDS) + "  mock late")
    for streams in map(int, arguments.streams.split(",")):
        found: dict[str, list[Calibration]] = {"direct": [], "nginx": []}
        for _ in range(arguments.rounds):
            for way in found:
                found[way].append(measure(streams, through_nginx=way == "nginx"))
        for way, rounds in found.items():
            values = [statistics.median(getattr(one, field) for one in rounds) for field in _FIELDS]
            late = statistics.median(one.mock_late_ms for one in rounds)
            print(f"{streams:7d}  {way:10}" + "".join(f"  {value:20.3f}" for value in values) + f"  {late:9.3f}")


def measure(streams: int, *, through_nginx: bool) -> Calibration:
    """Compare one run with what the mock did."""
    with running_mock(ttft_ms=_TTFT_MS, itl_ms=_ITL_MS) as mock:
        with proxy_to(mock.port) if through_nginx else nothing_between(mock.url) as url:
            endpoint = Endpoint(url, "mock")
            workload = calibration_workload(streams)
            run = OpenAiStreamDriver().run(endpoint, workload, seed=monotonic_ns(), progress=lambda _: None)
        return compare_run(run, mock.take_sent(), streams=streams, ttft_ms=_TTFT_MS, itl_ms=_ITL_MS)


@contextmanager
def proxy_to(port: int) -> Iterator[str]:
    """The nginx of a layout with replicas, in front of one server."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "proxy.log"
        server = f"127.0.0.1:{port}"
        proxy = NginxProxy(find_nginx(), [server], free_port(), log=log, locks=LentLocks((), ()), where="the mock")
        try:
            yield proxy.url
        finally:
            proxy.stop()


@contextmanager
def nothing_between(url: str) -> Iterator[str]:
    """The server itself."""
    yield url


if __name__ == "__main__":
    main()
