from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.adapters.server_watch import ServerWatch
from pytest_gpulayout.adapters.vllm_process import VllmLauncher
from pytest_gpulayout.agreement import agreement
from pytest_gpulayout.observing import Observer
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.server_window import ServerWindow
from pytest_gpulayout.workload import Workload
from tests.support.processes import server_spec, use_fake_vllm
from tests.support.prometheus import metrics_text

WORKLOAD = Workload(name="w", input_tokens=8, output_tokens=4, concurrency=1, requests=1)
SHARING = Workload(name="w", input_tokens=8, output_tokens=4, concurrency=1, requests=1, shares_prefix=True)
ACTIVATED = (
    "(EngineCore pid=7) INFO 11-21 03:43:40 [jit_monitor.py:80] Kernel JIT monitor activated; monitored JIT "
    "compilations during inference will use mode=warn.\n"
)
COMPILED = (
    "(EngineCore pid=7) WARNING 11-21 03:43:41 [jit_monitor.py:131] Triton JIT compilation during inference: k. "
    "This causes a latency spike; consider extending warmup to cover this shape/config.\n"
)


TLS = Path(__file__).parents[1] / "data" / "tls"


@dataclass
class Vllm:
    """A server whose answers a test sets.

    :ivar metrics: status and text, one answer after the other; the last one stays.
    :ivar reset: status and body, the same. :ivar asked: method, path and key of every request.
    """

    metrics: list[tuple[int, str]] = field(default_factory=lambda: [(200, metrics_text({}))])
    reset: list[tuple[int, str]] = field(default_factory=lambda: [(200, '{"success":true}')])
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, key: str | None) -> tuple[int, str]:
        self.asked.append((method, path, key))
        answers = {("GET", "/metrics"): self.metrics, ("POST", "/reset_prefix_cache"): self.reset}.get((method, path))
        if answers is None:
            return 404, ""
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def asked_for(self, path: str) -> int:
        return sum(asked == path for _, asked, _ in self.asked)


Start = Callable[..., Vllm]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[ThreadingHTTPServer] = []

    def start(tls: ssl.SSLContext | None = None) -> Vllm:
        vllm = Vllm()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet for an answer, or it waits for the other side to confirm the head

            def do_GET(self) -> None:
                status, text = vllm.answer(self.command, self.path, self.headers["Authorization"])
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        vllm.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
        return vllm

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def vllm(start: Start) -> Vllm:
    return start()


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def watch(
    vllm: Vllm,
    workload: Workload = WORKLOAD,
    *,
    log: Path | None = None,
    replicas: tuple[str, ...] = (),
    load: Callable[[], object] = lambda: None,
) -> ServerWindow:
    """What is seen of a server while a load runs."""
    clock = Time()
    watch = ServerWatch(
        Endpoint(vllm.url, "m", "the-key"),
        workload,
        logs=[] if log is None else [log],
        replicas=replicas,
        clock=clock,
        sleep=clock.sleep,
    )
    with watch:
        load()
    assert clock.now < 20
    return watch.seen


def counted(**numbers: float) -> tuple[int, str]:
    return 200, metrics_text(numbers)


NO_LOG = "the server's log is not at hand, so compilations meanwhile would go unseen"


# -- counters ------------------------------------------------------------------------------------------------------


def test_what_the_server_counted_under_the_load_and_nothing_else(vllm: Vllm) -> None:
    vllm.metrics = [counted(length=2, generation_tokens_total=64)]

    def load() -> None:
        vllm.metrics = [counted(length=6, generation_tokens_total=192, prompt_tokens_total=32)]

    seen = watch(vllm, load=load)
    (engine,) = seen.engines
    assert (engine.replica, engine.finished) == (vllm.url, {"length": 4})
    assert (seen.generation_tokens, seen.prompt_tokens) == (128, 32)
    assert seen == ServerWindow(engines=seen.engines, prefix_reset="done", notes=(NO_LOG,))


def test_the_key_is_sent_along(vllm: Vllm) -> None:
    watch(vllm)
    assert {key for _, _, key in vllm.asked} == {"Bearer the-key"}
    assert [asked[:2] for asked in vllm.asked[:2]] == [("POST", "/reset_prefix_cache"), ("GET", "/metrics")]


def test_a_server_behind_tls(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    vllm = start(context)
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
    assert watch(vllm) == ServerWindow(engines=watch(vllm).engines, prefix_reset="done", notes=(NO_LOG,))
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    monkeypatch.setenv("SSL_CERT_DIR", "/dev/null")
    seen = watch(vllm)
    assert seen.engines == ()
    assert seen.notes[0].startswith("a TLS connection to a server that can be trusted is needed; found: ")


def test_counters_are_read_once_they_stand_still(vllm: Vllm) -> None:
    vllm.metrics = [counted(generation_tokens_total=3), *[counted(generation_tokens_total=4)] * 3]

    def load() -> None:
        vllm.metrics = [
            counted(generation_tokens_total=9, running=1),
            counted(generation_tokens_total=9, running=1),
            counted(generation_tokens_total=10, waiting=1),
            counted(generation_tokens_total=10),
            counted(generation_tokens_total=10),
        ]

    seen = watch(vllm, load=load)
    assert (seen.generation_tokens, seen.settled) == (6, True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_counters_that_do_not_come_to_rest(vllm: Vllm, when: str) -> None:
    if when == "before":
        vllm.metrics = [counted(running=1)]

    def load() -> None:
        vllm.metrics = [counted(generation_tokens_total=8, running=float(when == "after"))]

    seen = watch(vllm, load=load)
    assert (seen.generation_tokens, seen.settled) == (8, False)
    assert seen.notes == (f"the server's counters did not come to rest within 5 s {when} the load", NO_LOG)


def test_each_replica_is_asked(start: Start) -> None:
    proxy, first, second = start(), start(), start()

    def load() -> None:
        first.metrics = [(200, metrics_text({"length": 1}, {"length": 2}))]
        second.metrics = [counted(length=4)]

    first.metrics = [(200, metrics_text({}, {}))]
    seen = watch(proxy, replicas=(f"{first.url}/", second.url), load=load)
    assert [(engine.replica, engine.engine, dict(engine.finished)) for engine in seen.engines] == [
        (first.url, "0", {"length": 1}),
        (first.url, "1", {"length": 2}),
        (second.url, "0", {"length": 4}),
    ]
    assert proxy.asked == []
    assert first.asked_for("/reset_prefix_cache") == second.asked_for("/reset_prefix_cache") == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, ""), "the server's counters are needed; found: HTTP 404; at URL/metrics"),
        (
            (200, "<html></html>"),
            "the server's side of a measurement needs metrics in Prometheus' text format; "
            "found: invalid metric name:<html></html>; at URL/metrics",
        ),
        (
            (200, "up 1\n"),
            "the server's side of a measurement needs the counters of a vLLM server; found: none called "
            "vllm:prompt_tokens_total, vllm:generation_tokens_total, vllm:request_success_total; at URL/metrics",
        ),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_metrics_that_cannot_be_read_become_a_note(
    vllm: Vllm, when: str, answer: tuple[int, str], words: str
) -> None:
    def load() -> None:
        vllm.metrics = [answer]

    if when == "before":
        load()
    seen = watch(vllm, load=load)
    assert seen == ServerWindow(prefix_reset="done", notes=(words.replace("URL", vllm.url), NO_LOG))


def test_one_replica_that_cannot_be_read_makes_all_counts_unknown(start: Start) -> None:
    first, second = start(), start()
    second.metrics = [(503, "")]
    seen = watch(first, replicas=(first.url, second.url))
    assert seen.engines == ()
    assert f"found: HTTP 503; at {second.url}/metrics" in seen.notes[0]


def test_a_restart_under_the_load_becomes_a_note(vllm: Vllm) -> None:
    def load() -> None:
        vllm.metrics = [(200, metrics_text({}, started=99))]

    seen = watch(vllm, load=load)
    assert seen.engines == ()
    assert "another process answered after it" in seen.notes[0]


def test_a_server_that_is_not_there_becomes_a_note() -> None:
    seen = watch(Vllm(url="http://127.0.0.1:1"))
    assert (seen.engines, seen.prefix_reset) == ((), "unavailable")
    assert "Connection refused" in seen.notes[0]


def test_a_load_that_breaks_off_is_not_looked_back_on(vllm: Vllm) -> None:
    asked = []

    def load() -> None:
        asked.append(len(vllm.asked))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(vllm, load=load)
    assert asked == [len(vllm.asked)]


def test_a_whole_run_is_counted_alike_by_client_and_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_vllm(monkeypatch)
    workload = Workload(name="w", input_tokens=12, output_tokens=5, concurrency=3, requests=9, batches=2)
    server = VllmLauncher(tmp_path).launch(server_spec("tp1"), lambda _: None)
    try:
        observer = Observer(OpenAiStreamDriver(), watch_server=partial(ServerWatch, logs=[server.log]))
        run = observer.run(server.endpoint, workload, seed=1, progress=lambda _: None)
    finally:
        server.stop()
    seen = run.observations.server
    assert seen is not None
    assert agreement(run, seen) == ()
    assert (seen.prompt_tokens, seen.generation_tokens) == (18 * 12, 18 * 5)
    assert [dict(engine.finished) for engine in seen.engines] == [{"length": 18}]
    assert agreement(replace(run, batches=run.batches[:1]), seen) != ()


# -- prefixes ------------------------------------------------------------------------------------------------------


def test_prefixes_that_the_workload_shares_are_kept(vllm: Vllm) -> None:
    assert watch(vllm, SHARING).prefix_reset == "not asked"
    assert vllm.asked_for("/reset_prefix_cache") == 0


def test_a_server_that_refuses_for_a_moment(vllm: Vllm) -> None:
    vllm.reset = [(200, '{"success":false}'), (200, '{"success":false}'), (200, '{"success":true}')]
    assert watch(vllm).prefix_reset == "done"
    assert vllm.asked_for("/reset_prefix_cache") == 3


def test_a_server_that_refuses_for_good(vllm: Vllm) -> None:
    vllm.reset = [(200, '{"success":false}')]
    seen = watch(vllm)
    assert seen.prefix_reset == "refused"
    assert seen.notes[0] == f"{vllm.url} refused for 2 s to empty its prefix cache before the load"
    assert len(seen.engines) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, '{"detail":"Not Found"}'), "answers HTTP 404; vLLM offers it with VLLM_SERVER_DEV_MODE=1"),
        ((401, '{"error":"Unauthorized"}'), "answers HTTP 401"),
        ((500, ""), "answers HTTP 500"),
        ((200, ""), "does not say whether it did"),
        ((200, "[]"), "does not say whether it did"),
        ((200, '{"success":1}'), "does not say whether it did"),
    ],
)
def test_a_server_that_cannot_be_asked(vllm: Vllm, answer: tuple[int, str], words: str) -> None:
    vllm.reset = [answer]
    seen = watch(vllm)
    assert seen.prefix_reset == "unavailable"
    assert seen.notes[0] == f"asked to empty its prefix cache before the load, {vllm.url} {words}"
    assert vllm.asked_for("/reset_prefix_cache") == 1
    assert len(seen.engines) == 1


def test_the_worst_answer_of_all_replicas_counts(start: Start) -> None:
    first, second, third = start(), start(), start()
    second.reset, third.reset = [(200, '{"success":false}')], [(404, "")]
    urls = (first.url, second.url, third.url)
    assert watch(first, replicas=urls).prefix_reset == "refused"
    assert watch(first, replicas=(first.url, third.url)).prefix_reset == "unavailable"


# -- the log -------------------------------------------------------------------------------------------------------


def test_only_what_was_logged_under_the_load_counts(vllm: Vllm, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(ACTIVATED + COMPILED.replace("k.", "before."))
    (jit,) = watch(vllm, log=log, load=lambda: append(log, COMPILED)).jit
    assert jit == "EngineCore: Triton JIT compilation during inference: k"
    seen = watch(vllm, log=log)
    assert (seen.jit, seen.notes) == ((), ())


def test_steps_of_the_window(vllm: Vllm, tmp_path: Path) -> None:
    def steps(*indices: int) -> str:
        text = "0 context requests, 0 context tokens, 2 generation requests, 2 generation tokens"
        return "".join(
            f"(APIServer pid=7) INFO 11-21 03:43:40 [loggers.py:194] Engine 000: Iteration({index}): {text}, "
            f"iteration elapsed time: {index}.50 ms, CPU KV cache usage: 0.1%\n"
            for index in indices
        )

    log = tmp_path / "server.log"
    log.write_text(ACTIVATED + steps(1, 2, 3))
    (times,) = watch(vllm, log=log, load=lambda: append(log, steps(4, 5, 6))).steps
    assert (times.steps, times.decode_steps, times.median_ms) == (3, 2, 6.0)


def test_a_server_that_does_not_log_compilations(vllm: Vllm, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("(EngineCore pid=7) INFO 11-21 03:43:40 [core.py:402] init engine\n")
    seen = watch(vllm, log=log, load=lambda: append(log, ACTIVATED))
    assert seen.notes == ("the server does not log compilations, so they would go unseen",)


def test_a_log_that_was_cut(vllm: Vllm, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(ACTIVATED * 2)
    seen = watch(vllm, log=log, load=lambda: log.write_text(COMPILED))
    assert seen.notes == (f"{log} was cut while it was measured, so compilations would go unseen",)


def test_a_log_that_is_not_there(vllm: Vllm, tmp_path: Path) -> None:
    seen = watch(vllm, log=tmp_path / "server.log")
    assert len(seen.engines) == 1
    assert seen.notes[0].startswith("the server's log cannot be read: ")


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
