"""Measuring on the running server, and judging with as many fresh starts of it as the verdict needs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_gpulayout.errors import ServerError
from pytest_gpulayout.gate import PlacedLayout
from pytest_gpulayout.judging import NOISE_PRIORS, GateInputs, GatePolicy, judge_performance
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.ports import Server
from pytest_gpulayout.servers import ModelSpec, ServerOwner
from pytest_gpulayout.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpulayout.live import LiveLine
    from pytest_gpulayout.settings import Settings
    from pytest_gpulayout.tolerance import Tolerance
    from pytest_gpulayout.trace import RunTrace
    from pytest_gpulayout.validity import Problem
    from pytest_gpulayout.wiring import Wiring
    from pytest_gpulayout.workload import Workload


class Performance:
    """The measuring side of a run: observed load, the servers' owner, and the policy of the options.

    :param after_load: called after each run of load; what it returns makes the numbers invalid, and what it raises
        takes their place.
    """

    def __init__(
        self,
        settings: Settings,
        wiring: Wiring,
        servers: ServerOwner,
        live: LiveLine,
        after_load: Callable[[], tuple[Problem, ...]],
    ) -> None:
        self._settings = settings
        self._wiring = wiring
        self._servers = servers
        self._live = live
        self._after_load = after_load

    def measure(
        self, server: Server, placed: PlacedLayout, model: ModelSpec, arguments: tuple[str, ...], workload: Workload
    ) -> Measurement:
        """Measure a workload on the running server.

        :param arguments: of the server, without those of the model's marker: they are software under test.
        :raises GpuLayoutError: nothing could be measured; when the server died, its own cause is the message.
        """
        from pytest_gpulayout.adapters.host import identify, model_identity

        identity = identify(
            placed,
            model=model_identity(model.name, model.arguments),
            arguments=arguments,
            workload=workload,
            proof=server.proof,
        )
        run, problems = self._load(server, workload)
        covariates = {**identity.covariates, "client scheduling": run.scheduling}
        return Measurement(replace(identity, covariates=covariates), workload, ()).with_run(run, problems)

    def _load(self, server: Server, workload: Workload) -> tuple[RunTrace, tuple[Problem, ...]]:
        observer = self._wiring.observer(server)
        seed, progress = secrets.randbits(48), self._live.update
        try:
            run = observer.run(server.endpoint, workload, seed=seed, progress=progress, server=server)
        except ServerError:
            self._servers.check()  # clears it away, so that the next test gets a fresh one
            raise
        finally:
            self._live.clear()
        return run, self._after_load()

    def judge(self, measurement: Measurement, tolerances: Mapping[str, Tolerance]) -> tuple[Verdict, Measurement]:
        """Judge a measurement; returns it with all its starts.

        :raises BaselineError: there is no baseline that can be used.
        """
        from pytest_gpulayout.adapters.host import utc_now

        began = time.monotonic()
        inputs = GateInputs(
            store=self._wiring.store(),
            policy=self._policy(tolerances),
            measure_again=self._measure_again,
            say=self._live.say,
            now_utc=utc_now,
            elapsed_s=lambda: time.monotonic() - began + measurement.runs[0].duration_s,
        )
        return judge_performance(measurement, inputs)

    def _measure_again(self, measurement: Measurement) -> Measurement:
        number = len(measurement.runs) + 1
        layout = measurement.identity.key.layout
        self._live.say(f"{layout}: {measurement.workload.name}: fresh server start {number}")
        return measurement.with_run(*self._load(self._servers.restart(), measurement.workload))

    def _policy(self, tolerances: Mapping[str, Tolerance]) -> GatePolicy:
        return GatePolicy(
            mode=self._settings.baseline_mode,
            tolerances=tolerances,
            prior=NOISE_PRIORS[self._settings.platform],
            starts=self._settings.starts,
            budget_s=self._settings.budget_s,
        )
