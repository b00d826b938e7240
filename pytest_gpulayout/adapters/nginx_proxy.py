"""One address in front of several servers: an nginx of our own, which hands each request to the server with fewest.

nginx runs without rights beyond those of pytest, from a temporary folder with a configuration of its own, listens on
loopback only, and lies below a keeper (:mod:`~pytest_gpulayout.adapters.keeper`) like every server. What the
configuration is made for, with the documentation of nginx it rests on (nginx.org/en/docs/http/):

- ``least_conn`` (``ngx_http_upstream_module``) counts per worker process, so there is one worker.
- Nothing is held back: ``proxy_buffering off`` passes every piece of an answer on when it is read, ``tcp_nodelay``
  sends it at once (``ngx_http_proxy_module``, ``ngx_http_core_module``). The timestamps of a client stay good.
- Connections are kept on both sides, and to the servers for less time than vLLM keeps them: nginx never sends a
  request on a connection that the server is about to close.
- A request that could not be handed over goes to the next server (``proxy_next_upstream``). One that was sent does
  not, since a ``POST`` is not idempotent: the client sees it fail, and no server computes it twice.
- A server that refused three requests within 5 s gets none for 5 s.
- It takes the lowest real-time priority where it may (``CAP_SYS_NICE``): on a host whose cores are all busy with the
  servers (vLLM's CPU backend spins while it waits) it would hold back whole answers.

Leaves starting the servers to :mod:`~pytest_gpulayout.adapters.replica_launcher`.
"""

from __future__ import annotations

import os
import pwd
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_gpulayout.adapters.device_lock import DeviceLocks, LentLocks
from pytest_gpulayout.adapters.kept_process import KeptProcess, describe_exit
from pytest_gpulayout.errors import ServerError, ServerExited, ServerStartFailed

REPLICA_HEADER = "X-Replica"
"""Of every answer: address of the server that gave it; with several, those before the last could not be reached."""

_SEARCHED_TOO = ("/usr/sbin", "/usr/local/sbin", "/usr/local/nginx/sbin")  # not on every user's PATH
_VERSION = re.compile(r"nginx version: (?P<name>\S+?)/(?P<numbers>\d+(?:\.\d+)+)")
_ERROR_LOG_OPTION_SINCE = (1, 19, 5)  # -e; before, nginx opens the log that was compiled in, and only warns
_MOST_FILES = 16384
_START_TIMEOUT_S = 10.0
_TERM_TIMEOUT_S = 5.0
_GRACE_S = 15.0
_POLL_S = 0.02
_TAIL_LINES = 8

_CONFIGURATION = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
error_log stderr notice;
pid nginx.pid;
{user}
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  upstream replicas {{
    least_conn;
{servers}
    keepalive {connections};
    keepalive_requests 1000000;
    keepalive_timeout 60s;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_timeout 3600s;
    keepalive_requests 1000000;
    client_max_body_size 0;
    client_body_buffer_size 1m;
    tcp_nodelay on;
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_buffering off;
      proxy_connect_timeout 5s;
      proxy_send_timeout 3600s;
      proxy_read_timeout 3600s;
      proxy_next_upstream error timeout http_502 http_503;
      add_header {header} $upstream_addr always;
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Nginx:
    """An nginx that is installed. :param version: ``"nginx/1.22.1"``. :param numbers: the same, to compare."""

    path: str
    version: str
    numbers: tuple[int, ...]


def find_nginx() -> Nginx:
    """Find the nginx of this machine.

    :raises ServerStartFailed: there is none, or it does not run; with the command that installs it.
    """
    searched = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SEARCHED_TOO])
    path = shutil.which("nginx", path=searched)
    if path is None:
        raise _unusable("found none", f"PATH and {', '.join(_SEARCHED_TOO)}")
    try:
        done = subprocess.run([path, "-v"], check=False, timeout=10, capture_output=True, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unusable(f"it does not run: {error}", path) from error
    match = _VERSION.search(done.stderr + done.stdout)
    if match is None:
        raise _unusable(f"it does not say its version: {(done.stderr or done.stdout).strip()[:200]!r}", path)
    numbers = tuple(int(number) for number in match["numbers"].split("."))
    return Nginx(path, f"{match['name']}/{match['numbers']}", numbers)


def _unusable(found: str, where: str) -> ServerStartFailed:
    return ServerStartFailed(
        f"nginx is required in front of the replicas of a layout xN, {found}\n  in {where}\n"
        "  install it: apt-get install nginx-light (Debian, Ubuntu; elsewhere the package is called nginx)"
    )


def nginx_configuration(port: int, servers: Sequence[str], *, files: int, user: str | None) -> str:
    """Return the configuration of a proxy.

    :param port: of loopback. :param servers: ``HOST:PORT`` of each server.
    :param files: how many it may have open; two for each request in flight.
    :param user: whom its worker runs as, ``None`` where nginx is not started by root and cannot choose.
    """
    return _CONFIGURATION.format(
        files=files,
        connections=files - 64,  # what is no connection: logs, pipes, epoll
        user="" if user is None else f"user {user} {user};",
        servers="\n".join(f"    server {server} max_fails=3 fail_timeout=5s;" for server in servers),
        port=port,
        header=REPLICA_HEADER,
    )


class NginxProxy:
    """An nginx in front of servers; it is there when it was made, and gone after :meth:`stop`.

    :param servers: ``HOST:PORT`` of each. :param port: of loopback, to listen at. :param log: gets all it says.
    :param locks: held while it runs. :param where: what is behind it, for messages.
    :ivar scheduling: policy of its processes, ``SCHED_FIFO`` or ``SCHED_OTHER``.
    :raises ServerStartFailed: it does not listen; nothing of it is left.
    """

    def __init__(
        self,
        nginx: Nginx,
        servers: Sequence[str],
        port: int,
        *,
        log: Path,
        locks: DeviceLocks | LentLocks,
        where: str,
    ) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        self.version = nginx.version
        self._where = where
        self._run_dir = Path(tempfile.mkdtemp(prefix="gpulayout-"))
        configuration = nginx_configuration(port, servers, files=_open_files(), user=_user())
        (self._run_dir / "nginx.conf").write_text(configuration, encoding="utf-8")
        # All paths in the configuration are relative to the folder, whose name may hold what nginx would take apart.
        self.command = [nginx.path, "-p", str(self._run_dir), "-c", "nginx.conf"]
        if nginx.numbers >= _ERROR_LOG_OPTION_SINCE:
            self.command += ["-e", "stderr"]
        log.touch()
        self._kept = KeptProcess(
            self.command,
            os.environ,
            log=log,
            run_dir=self._run_dir,
            locks=locks,
            term_timeout_s=_TERM_TIMEOUT_S,
        )
        try:
            self._wait_until_it_listens(port)
            self.scheduling = self._take_priority()
        except BaseException:
            self.stop()
            raise

    def check_alive(self) -> None:
        """Do nothing while it runs.

        :raises ServerExited: it is gone; with the end of its log.
        """
        if self._kept.exit_code is not None:
            raise self._error(ServerExited, f"nginx in front of {self._where} went away while it was in use")

    def ask_to_end(self) -> None:
        """Begin to end it; :meth:`stop` waits."""
        self._kept.ask_to_end()

    def stop(self) -> None:
        """End it and remove its folder; may be called again.

        :raises ServerError: it cannot be ended.
        """
        try:
            self._kept.end(_TERM_TIMEOUT_S + _GRACE_S)
        except subprocess.TimeoutExpired as error:
            pids = " ".join(str(process.pid) for process in self._kept.processes())
            raise ServerError(
                f"nginx in front of {self._where} must be gone {_TERM_TIMEOUT_S + _GRACE_S:.0f} s after it was asked "
                f"to end, and is not\n  its processes: {pids or 'only its keeper'}\n"
                f"  end them: kill -9 {pids} {self._kept.keeper_pid}",
                command=self.command,
            ) from error
        shutil.rmtree(self._run_dir, ignore_errors=True)  # the keeper did, unless it was killed

    def _wait_until_it_listens(self, port: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (_takes_connections(port) and len(self._kept.processes()) > 1):  # master and worker
            if self._kept.exit_code is not None or time.monotonic() > deadline:
                raise self._error(ServerStartFailed, f"nginx in front of {self._where} does not listen at {self.url}")
            time.sleep(_POLL_S)

    def _take_priority(self) -> str:
        """Let it run before all ordinary processes, where that is allowed; return the policy."""
        lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO))
        try:
            for process in self._kept.processes():
                os.sched_setscheduler(process.pid, os.SCHED_FIFO, lowest)
        except OSError:  # not allowed, or a kernel without it: where cores are short, it waits for one
            return "SCHED_OTHER"
        return "SCHED_FIFO"

    def _error(self, kind: type[ServerError], headline: str) -> ServerError:
        code = self._kept.exit_code
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = [line for line in lines if line.strip()][-_TAIL_LINES:]
        cause = next((line for line in tail if "[emerg]" in line or "[alert]" in line), "its log does not say")
        message = "\n".join(
            [
                headline + ("" if code is None else f" ({describe_exit(code)})"),
                f"  cause: {cause}",
                f"  command: {' '.join(self.command)}",
                f"  log: {self.log}, its last lines:",
                *(f"    {line[:200]}" for line in tail),
                f"  read it: less {self.log}",
            ]
        )
        return kind(message, command=self.command, exit_code=code, log_tail=tail)


def _open_files() -> int:
    """As many as the system lets this process raise its limit to, and more than is ever needed at most."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)


def _user() -> str | None:
    """Root, who would else give the worker to a user that may not enter our folder; nobody else can choose."""
    return pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None


def _takes_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
