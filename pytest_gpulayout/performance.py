"""Measuring on the running server, and judging with as many fresh starts as the verdict needs.

In paired mode they are starts of two sides in turn: of the server under test, and of what it is compared with.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_gpulayout.errors import ServerError
from pytest_gpulayout.evidence import communication, startup_facts
from pytest_gpulayout.fingerprint import parse_fingerprint
from pytest_gpulayout.gate import PlacedLayout
from pytest_gpulayout.judging import NOISE_PRIORS, GateInputs, GatePolicy, judge_performance
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.observed import observe_start
from pytest_gpulayout.ports import Progress, Server, ServerSpec
from pytest_gpulayout.proofs import identity_of_attached, remarks_on
from pytest_gpulayout.servers import ModelSpec, ServerOwner
from pytest_gpulayout.verdict import Status, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpulayout.adapters.base_side import BaseServer
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.live import LiveLine
    from pytest_gpulayout.measurement import Identity
    from pytest_gpulayout.pairing import BaseSide, PairedResult, Start
    from pytest_gpulayout.settings import BaseChoice, Settings
    from pytest_gpulayout.tolerance import Tolerance
    from pytest_gpulayout.trace import RunTrace
    from pytest_gpulayout.validity import Problem
    from pytest_gpulayout.wiring import Wiring
    from pytest_gpulayout.workload import Workload


_LOOK_EVERY_S = 1.0


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
        self._loaded: Server | None = None
        self._first_run: RunTrace | None = None
        self._sent: Counter[tuple[ServerSpec, str]] = Counter()
        self._seeds: dict[tuple[str, int], int] = {}
        self._measured: tuple[PlacedLayout, ModelSpec] | None = None

    def measure(
        self, server: Server, placed: PlacedLayout, model: ModelSpec, arguments: tuple[str, ...], workload: Workload
    ) -> Measurement:
        """Measure a workload on the running server.

        :param arguments: of the server, without those of the model's marker: they are software under test.
        :raises GpuLayoutError: nothing could be measured; when the server died, its own cause is the message.
        """
        from pytest_gpulayout.adapters.host import identify, model_identity

        if server.proof.moe:  # so that a key does not depend on whether a config.json was at hand before the start
            placed = placed.with_experts()
        identity = identify(
            placed,
            model=model_identity(
                model.name, model.arguments, arguments=arguments, server_dtype=startup_facts(server).dtype
            ),
            arguments=arguments,
            workload=workload,
            proof=server.proof,
        )
        if server.proof.sight is not None:
            identity = identity_of_attached(identity, server.proof.sight, placed.topology)
        self._measured = placed, model
        run, problems, observed = self._load(server, workload)
        covariates = {**identity.covariates, "client scheduling": run.scheduling, **communication(server, placed)}
        identity = replace(identity, covariates=covariates)
        return Measurement(identity, workload, ()).with_run(run, problems, observed)

    def _load(self, server: Server, workload: Workload, seed: int | None = None) -> Start:
        """Return a run, what was wrong beside it, and what else was seen of this server start."""
        observer = self._wiring.observer(server)
        seed = self._seed_of(server.spec, workload) if seed is None else seed
        try:
            run = observer.run(server.endpoint, workload, seed=seed, progress=self._watching(server), server=server)
            server.check_alive()  # a replica may be gone, and the others have answered in its place
        except ServerError:
            self._servers.check()  # clears it away, so that the next test gets a fresh one
            raise
        finally:
            self._live.clear()
        if server is not self._loaded:
            self._loaded, self._first_run = server, run
        kv_cache_tokens = startup_facts(server).kv_cache_tokens
        observed = observe_start(run, start_s=server.proof.start_s, kv_cache_tokens=kv_cache_tokens)
        return run, self._after_load(), observed

    def _watching(self, server: Server) -> Progress:
        """Show what is going on, and raise as soon as the server is gone: behind a proxy load goes on without it."""
        due_s = 0.0

        def progress(text: str) -> None:
            nonlocal due_s
            if time.monotonic() >= due_s and not server.proof.is_attached:  # its requests fail when it is gone
                server.check_alive()
                due_s = time.monotonic() + _LOOK_EVERY_S
            self._live.update(text)

        return progress

    def measure_on(self, spec: ServerSpec, measurement: Measurement) -> Measurement:
        """Measure the same workload once more, on a fresh server of ``spec``, whichever has the place now.

        :raises GpuLayoutError: the server does not start, or nothing could be measured.
        """
        number = len(measurement.runs) + 1
        self._live.say(f"{spec.layout}: {measurement.workload.name}: fresh server start {number}")
        return measurement.with_run(*self._load(self._servers.lend(spec), measurement.workload))

    def _seed_of(self, spec: ServerSpec, workload: Workload) -> int:
        """The same prompts for the n-th load of each layout, so that layouts differ in nothing else.

        A server never gets a seed twice; a base that runs throughout would, so in paired mode all are new.
        """
        if self._settings.base is not None:
            return _new_seed()
        fingerprint = workload.fingerprint()
        self._sent[spec, fingerprint] += 1
        return self._seeds.setdefault((fingerprint, self._sent[spec, fingerprint]), _new_seed())

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
        verdict, measurement = judge_performance(measurement, inputs)
        return self._with_remarks(verdict), measurement

    def _with_remarks(self, verdict: Verdict) -> Verdict:
        """Say of a server that somebody else runs what a verdict does not rest on; of a void one nothing rests."""
        server = self._servers.current
        if server is None or server.proof.sight is None or verdict.status is Status.INVALID:
            return verdict
        return replace(verdict, reasons=(*verdict.reasons, *remarks_on(server.proof.sight)))

    def _measure_again(self, measurement: Measurement) -> Measurement:
        number = len(measurement.runs) + 1
        layout = measurement.identity.key.layout
        server = self._servers.current
        if server is not None and server.proof.is_attached:  # only what disturbed its one start is measured again
            self._live.say(f"{layout}: {measurement.workload.name}: once more on the same server")
            return measurement.with_run(*self._load(server, measurement.workload))
        self._live.say(f"{layout}: {measurement.workload.name}: fresh server start {number}")
        return measurement.with_run(*self._load(self._servers.restart(), measurement.workload))

    # -- paired mode -----------------------------------------------------------------------------------------------

    def check_base(self) -> None:
        """Do nothing when the base of paired mode can be used, as far as that is known before anything runs.

        :raises GpuLayoutError: it has no vLLM, or does not answer.
        """
        choice = self._settings.base
        if choice is not None and choice.url:
            self._wiring.base_server(choice)
        elif choice is not None:
            self._wiring.base_python(choice)

    def judge_in_pairs(self, measurement: Measurement, tolerances: Mapping[str, Tolerance]) -> PairedResult:
        """Judge a measurement of the running server against fresh servers of ``--gpu-base``.

        Afterwards the tests' own server is there when it is asked for, and the base's is gone.

        :raises GpuLayoutError: a server of either side failed, or nothing could be measured.
        """
        from pytest_gpulayout.adapters.host import utc_now
        from pytest_gpulayout.pairing import PairingInputs, judge_in_pairs

        began = time.monotonic()
        candidate = self._servers.needed().spec
        sides = PairedServers(self._settings, self._wiring, self._servers, self._live, self._load, self._after_load)
        assert self._measured is not None
        base = sides.base(candidate, *self._measured, measurement)
        if measurement.runs[0] is not self._first_run:  # the server had served before: the base's have not
            start = sides.start("the candidate", candidate, measurement)(measurement.runs[0].seed)
            measurement = replace(measurement, runs=(), disturbances={}, sightings={}).with_run(*start)
        inputs = PairingInputs(
            base=base,
            start_candidate=sides.start("the candidate", candidate, measurement),
            tolerances=tolerances,
            blocks=self._settings.starts,
            budget_s=self._settings.budget_s,
            store=self._wiring.store(),
            new_seed=_new_seed,
            now_utc=utc_now,
            elapsed_s=lambda: time.monotonic() - began + measurement.runs[0].duration_s,
            say=self._live.say,
        )
        try:
            return judge_in_pairs(measurement, inputs)
        finally:
            self._servers.end_loan()

    def _policy(self, tolerances: Mapping[str, Tolerance]) -> GatePolicy:
        return GatePolicy(
            mode=self._settings.baseline_mode,
            tolerances=tolerances,
            prior=NOISE_PRIORS[self._settings.platform],
            starts=self._settings.starts,
            budget_s=self._settings.budget_s,
            may_write=self._settings.may_write,
            restarts=self._settings.attach is None,
        )


class PairedServers:
    """The servers of both sides of paired mode, one at a time on the same devices.

    :param load: sends a workload of a seed to a server.
    """

    def __init__(
        self,
        settings: Settings,
        wiring: Wiring,
        servers: ServerOwner,
        live: LiveLine,
        load: Callable[[Server, Workload, int], Start],
        after_load: Callable[[], tuple[Problem, ...]],
    ) -> None:
        self._settings = settings
        self._wiring = wiring
        self._servers = servers
        self._live = live
        self._load = load
        self._after_load = after_load

    def start(self, side: str, spec: ServerSpec, measurement: Measurement) -> Callable[[int], Start]:
        """Return what starts a fresh server and sends it the measurement's workload with a seed."""
        workload, layout = measurement.workload, measurement.identity.key.layout

        def start(seed: int) -> Start:
            self._live.say(f"{layout}: {workload.name}: fresh server of {side}")
            return self._load(self._servers.lend(spec), workload, seed)

        return start

    def base(
        self, candidate: ServerSpec, placed: PlacedLayout, model: ModelSpec, measurement: Measurement
    ) -> BaseSide:
        """Return what the candidate is compared with."""
        choice = self._settings.base
        assert choice is not None
        if choice.url:
            return self._running_base(self._wiring.base_server(choice), candidate.layout, measurement)
        return self._restarted_base(choice, candidate, placed, model, measurement)

    def _restarted_base(
        self,
        choice: BaseChoice,
        candidate: ServerSpec,
        placed: PlacedLayout,
        model: ModelSpec,
        measurement: Measurement,
    ) -> BaseSide:
        from pytest_gpulayout.adapters.base_side import shared_vllm
        from pytest_gpulayout.pairing import BaseSide

        found = self._wiring.base_python(choice)
        arguments = candidate.arguments if choice.vllm_args is None else (*choice.vllm_args, *model.arguments)
        own = arguments[: len(arguments) - len(model.arguments)]
        spec = replace(candidate, python=found.python, arguments=arguments)
        shared = shared_vllm(found)
        remarks = (f"both sides import vLLM from {shared}: PYTHONPATH, or a shared install",) if shared else ()

        def identify(identity: Identity) -> Identity:
            server = self._servers.current
            assert server is not None
            versions = {name: version for name, version in found.versions.items() if version is not None}
            nccl = {"nccl": versions.pop("nccl")} if "nccl" in versions else {}
            told = {**versions, "vllm": server.proof.vllm_version, "arguments": " ".join(own)}
            return replace(
                identity,
                sut={**identity.sut, **told},
                epoch={**identity.epoch, **nccl},
                covariates={**identity.covariates, **communication(server, placed)},
            )

        return BaseSide(
            choice.name,
            self.start(f"the base {choice.name}", spec, measurement),
            identify,
            remarks=lambda: remarks,
        )

    def _running_base(self, found: BaseServer, layout: Layout, measurement: Measurement) -> BaseSide:
        from pytest_gpulayout.pairing import BaseSide

        endpoint = found.serving(self._servers.needed().endpoint.model)
        observer = self._wiring.observer_of_url()
        said: list[str] = []

        def start(seed: int) -> Start:
            self._live.say(f"{measurement.identity.key.layout}: {measurement.workload.name}: base {found.name}")
            try:
                run = observer.run(endpoint, measurement.workload, seed=seed, progress=self._live.update)
            finally:
                self._live.clear()
            said[:] = run.fingerprints
            return run, self._after_load(), {}

        def identify(identity: Identity) -> Identity:
            unknown = {**dict.fromkeys(identity.sut), "vllm": found.version}
            return replace(identity, sut=unknown, epoch=dict.fromkeys(identity.epoch), covariates={}, topology={})

        return BaseSide(
            found.name, start, identify, restarts=False, remarks=lambda: _not_proved(said, found.version, layout)
        )


def _not_proved(fingerprints: Sequence[str], version: str | None, layout: Layout) -> tuple[str, ...]:
    """What is not known of a server that somebody else started."""
    unknown = ["its devices and what else runs on them", "its arguments", "its log"]
    parsed = parse_fingerprint(fingerprints[0]) if fingerprints else None
    contradiction = None if parsed is None else parsed.contradiction(layout)
    if parsed is None:
        unknown.insert(0, "its layout")
    if version is None:
        unknown.insert(0, "its vLLM version")
    lines = (f"not proved of the base: {', '.join(unknown)}",)
    return (*lines, f"the base is of another layout: {contradiction}") if contradiction else lines


def _new_seed() -> int:
    return secrets.randbits(48)
