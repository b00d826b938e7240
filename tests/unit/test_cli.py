from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.native.build import (
    DRIVER_NOT_LOADED,
    FakeGpu,
    FakeMachine,
    FakePair,
    build_fake_nvml,
    fake_nvml_environment,
)
from tests.support.command_line import Run

TOPO = """\
\tGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity
GPU0\t X \tSYS\tSYS\t0-7\t0
GPU1\tSYS\t X \tNV4\t8-15\t1
GPU2\tSYS\tNV4\t X \t8-15\t1
"""


def write(name: str, text: str | bytes) -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["topo", "nccl", "plan", "measure", "compare", "baseline list", "baseline show"])
def test_help_has_examples_and_exit_codes(run: Run, command: str) -> None:
    ran = run(*command.split(), "--help")
    assert ran.code == 0
    assert "examples:\n  " in ran.out
    assert f"gpulayout {command}" in ran.out
    assert "exit codes: 0 fine, 1 the check failed, 2 misuse or unreadable input" in ran.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("plans", "invalid choice: 'plans'"),
        ("topo extra", "unrecognized arguments: extra"),
        ("topo --layout tp0", "layout: the number after 'tp' must be at least 1: 0\n  tp0\n    ^ column 3"),
        ("topo --require nvlink4", "link requirement: expected nothing after 'nvlink'"),
        ("nccl", "the following arguments are required: FILE"),
        ("compare a.json", "the following arguments are required: MEASUREMENT.json"),
        ("compare a b --tolerance x=5%", "tolerance: unknown metric 'x'"),
        ("baseline", "the following arguments are required: COMMAND"),
    ],
)
def test_misuse_is_exit_code_2(run: Run, arguments: str, told: str) -> None:
    ran = run(*arguments.split())
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


def in_new_process(*arguments: str, code: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "pytest_gpulayout"]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_python_m_is_the_command(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_text(TOPO)
    done = in_new_process("topo", "--from", "topo.txt", "--require", "nvlink", cwd=tmp_path)
    assert done.returncode == 1
    assert "failed: GPUs 0 and 1: link SYS, nvlink required" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pytest_gpulayout.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'scipy', 'pynvml', 'requests', 'jsonschema', 'pytest', 'httptools'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert in_new_process(code=code).returncode == 0


def test_a_reader_that_goes_away_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_text(TOPO)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "pytest_gpulayout", "topo", "--from", "topo.txt", "--require", "phb"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=60)
    os.close(write_end)
    assert done.returncode == 1
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr


# -- topo ------------------------------------------------------------------------------------------------------------


def test_topo_prints_table_and_placement(run: Run) -> None:
    ran = run("topo", "--from", write("topo.txt", TOPO), "--layout", "tp2", "--require", "nv4")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "recorded in topo.txt",
        "",
        "      GPU0  GPU1  GPU2  CPU Affinity  NUMA Affinity  GPU NUMA ID",
        "GPU0   X    SYS   SYS   0-7           0              N/A",
        "GPU1  SYS    X    NV4   8-15          1              N/A",
        "GPU2  SYS   NV4    X    8-15          1              N/A",
        "",
        "Legend:",
        "  NV#  # bonded NVLinks",
        "  SYS  from one NUMA node to another (QPI, UPI)",
        "",
        "worst link: SYS (GPUs 0 and 1, 0 and 2)",
        "NVLink islands: 1-2",
        "best placement of tp2: GPU 1, 2; worst link NV4 (GPUs 1 and 2)",
    ]


def test_topo_output_can_be_read_back(run: Run) -> None:
    first = run("topo", "--from", write("topo.txt", TOPO), "--json").document
    printed = run("topo", "--from", "topo.txt", "--layout", "tp2").out
    again = run("topo", "--from", write("printed.txt", printed), "--json").document
    assert again == first | {"source": "printed.txt"}


def test_topo_json_can_be_read_back(run: Run) -> None:
    first = run("topo", "--from", write("topo.txt", TOPO), "--layout", "tp2", "--json")
    document = first.document
    assert document["links"][0] == {"a": 0, "b": 1, "class": "SYS"}
    assert (document["worst"], document["all_nvlink"], document["p2p"]) == ("SYS", False, [])
    assert document["placement"] == {"gpus": [1, 2], "worst": "NV4"}
    assert set(document["gpus"][0]) >= {"index", "name", "uuid", "numa_node", "cpu_affinity"}
    again = run("topo", "--from", write("topo.json", first.out), "--json").document
    assert again == document | {"source": "topo.json", "placement": None}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("--require any", 0, ""),
        ("--require node", 1, "failed: GPUs 0 and 1: link SYS, node required\nfailed: GPUs 0 and 2"),
        ("--layout tp2 --require nv4", 0, ""),
        ("--layout tp2 --require nv5", 1, "failed: ranks 0 and 1 (GPUs 1 and 2): link NV4, nv5 required"),
        ("--layout tp3 --require phb", 1, "failed: ranks 0 and 1 (GPUs 0 and 1): link SYS, phb required"),
        ("--layout tp1 --require nvlink", 0, ""),
        ("--require node", 1, "  recorded in topo.txt\n  --layout tp2 --require node would pass, on GPUs 1, 2\n"),
        (
            "--layout tp3 --require nv5",
            1,
            "  no smaller layout with links satisfies nv5; --require any accepts every",
        ),
        ("--layout tp2 --require nv5", 1, "  no layout with links satisfies nv5; --require any accepts every link\n"),
        ("--layout tp2@2 --require nvlink", 0, ""),
        ("--layout tp4@2 --require nvlink", 0, ""),
        ("--layout tp4", 1, "failed: layout tp4 needs 4 GPUs, found 3 (source topo.txt): 0, 1, 2"),
        ("--layout tp4 --require any", 1, "failed: layout tp4 needs 4 GPUs"),
    ],
)
def test_topo_checks(run: Run, arguments: str, code: int, told: str) -> None:
    for more in ([], ["--json"]):
        ran = run("topo", "--from", write("topo.txt", TOPO), *arguments.split(), *more)
        assert ran.code == code
        assert told in ran.err
        assert bool(ran.err) is bool(told)


def test_topo_says_when_a_layout_does_not_fit(run: Run) -> None:
    ran = run("topo", "--from", write("topo.txt", TOPO), "--layout", "tp4")
    assert ran.out.endswith("\nbest placement of tp4: not possible on this machine\n")


def gpu(index: int, **facts: Any) -> dict[str, Any]:
    return {"index": index, **facts}


def recording(*gpus: dict[str, Any], link: str | None = "NV12", **more: Any) -> str:
    """JSON of a machine in which GPUs without a fault are all linked alike."""
    sound = [g["index"] for g in gpus if "fault" not in g]
    links = [{"a": a, "b": b, "class": link} for a in sound for b in sound if a < b]
    return json.dumps({"schema_version": 1, "gpus": gpus, "links": links, **more})


LOST = recording(gpu(0), gpu(1), gpu(2), gpu(3, fault="GPU is lost"))
WITH_MIG = recording(gpu(0), gpu(1, mig=True))
WITH_LAYOUT = "  with --layout SPEC only the GPUs of the layout are checked\n"


@pytest.mark.parametrize(
    ("text", "arguments", "code", "told"),
    [
        (recording(gpu(0)), "", 0, ""),
        (recording(gpu(0)), "--require any", 0, ""),
        (recording(gpu(0)), "--layout tp1 --require nvlink", 0, ""),
        (recording(gpu(0)), "--require nvlink", 1, "failed: a link to check was required, found one GPU\n"),
        (recording(), "--require pix", 1, "failed: a link to check was required, found no GPU that can be used\n"),
        (LOST, "", 0, ""),
        (LOST, "--layout tp2 --require nvlink", 0, ""),
        (LOST, "--require nvlink", 1, "failed: GPU 3 cannot be used: GPU is lost\n  recorded in topo.json\n"),
        (LOST, "--require nvlink", 1, "  --layout tp2 --require nvlink would pass, on GPUs 0, 1\n"),
        (LOST, "--layout tp4 --require nvlink", 1, "failed: layout tp4 needs 4 GPUs, found 3 "),
        (
            WITH_MIG,
            "--require any",
            1,
            "failed: GPU 1 cannot be used: MIG is on\n  recorded in topo.json\n" + WITH_LAYOUT,
        ),
        (WITH_MIG, "--require nvlink", 1, "failed: a link to check was required, found one GPU that can be used\n"),
        (
            recording(gpu(0), gpu(1), p2p=[{"a": 0, "b": 1, "capability": "n", "status": "NS"}]),
            "--require nvlink",
            1,
            "failed: GPUs 0 and 1: link NV12, but the driver says NS for NVLink (not supported), nvlink required\n",
        ),
        (
            recording(*map(gpu, range(8)), link="PHB"),
            "--require nvlink",
            1,
            "link PHB, nvlink required\n  and 18 more\n",
        ),
    ],
)
def test_topo_checks_the_node(run: Run, text: str, arguments: str, code: int, told: str) -> None:
    ran = run("topo", "--from", write("topo.json", text), *arguments.split())
    assert ran.code == code
    assert told in ran.err
    assert bool(ran.err) is bool(told)


@pytest.mark.parametrize(
    ("variables", "terminal", "coloured"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_topo_is_coloured_on_a_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, coloured: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ran = run("topo", "--from", write("topo.txt", TOPO))
    assert ("\x1b[32mNV4\x1b[0m    X    8-15" in ran.out) is coloured
    assert ("\x1b" in ran.out) is coloured
    assert "\x1b" not in run("topo", "--from", "topo.txt", "--json").out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hello\n", "a table of links between GPUs was expected"),
        (TOPO[: TOPO.index("GPU2\tSYS")], "in topo.txt"),
        ("{", "a JSON document was expected"),
        ("{}", "a topology document was expected"),
        (b"\xff\xfe", "text in UTF-8 was expected"),
        ("", "found an empty file"),
    ],
)
def test_topo_refuses_what_it_cannot_read(run: Run, text: str | bytes, told: str) -> None:
    ran = run("topo", "--from", write("topo.txt", text), "--json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("gpulayout: ")
    assert told in ran.err


def test_topo_says_when_a_listing_settles_no_link(run: Run) -> None:
    listing = "\tCPU Affinity\tNUMA Affinity\nGPU0\t0-7\t0\nGPU1\t8-15\t1\n"
    ran = run("topo", "--from", write("topo.txt", listing), "--json")
    assert ran.code == 2
    assert (ran.document["links"], ran.document["worst"]) == ([], None)
    assert ran.err.startswith("gpulayout: a listing that shows links was required, found none between 2 GPUs\n")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("", 2),
        ("--require any", 2),
        ("--require nvlink", 2),
        ("--layout tp2", 2),
        ("--layout tp3 --require any", 2),
        ("--layout tp2 --require nvlink", 0),
        ("--layout tp2 --require nv5", 2),
    ],
)
def test_topo_of_a_listing_that_leaves_a_link_open(run: Run, arguments: str, code: int) -> None:
    text = TOPO.replace("X \tSYS\tSYS", "X \t???\tSYS").replace("GPU1\tSYS", "GPU1\t???")
    ran = run("topo", "--from", write("topo.txt", text), *arguments.split())
    told = (
        "gpulayout: a listing that shows every link was required, found none between GPUs 0 and 1\n"
        "  in topo.txt\n"
        "  record it again: nvidia-smi topo -m > topo.txt, or gpulayout topo --json > topo.json\n"
    )
    assert (ran.code, ran.err) == (code, told if code else "")


@pytest.mark.parametrize(("arguments", "code"), [("", 0), ("--require any", 0), ("--require nvlink", 1)])
def test_topo_of_a_listing_of_peer_access_alone(run: Run, arguments: str, code: int) -> None:
    text = "$ nvidia-smi topo -p2p r\n \tGPU0\tGPU1\n GPU0\tX\tCNS\n GPU1\tCNS\tX\n"
    ran = run("topo", "--from", write("p2p.txt", text), *arguments.split())
    assert ran.code == code
    assert "peer access: read refused for GPUs 0 and 1 (CNS: the chipset does not support it)\n" in ran.out
    assert "worst link: unknown (GPUs 0 and 1)\n" in ran.out


def test_topo_of_a_missing_file(run: Run) -> None:
    ran = run("topo", "--from", "missing.txt")
    assert (ran.code, "a recorded topology was expected, found none" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("machine", "code", "told"),
    [
        (FakeMachine(gpus=[FakeGpu()] * 2, default_pair=FakePair(nvlinks=4)), 0, ""),
        (FakeMachine(gpus=[FakeGpu()] * 2), 1, "failed: ranks 0 and 1 (GPUs 0 and 1): link SYS, nvlink required\n"),
        (FakeMachine(init_error=DRIVER_NOT_LOADED), 2, "gpulayout: "),
    ],
)
def test_topo_asks_nvml_when_no_file_is_given(tmp_path: Path, machine: FakeMachine, code: int, told: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environ |= fake_nvml_environment(build_fake_nvml(tmp_path), machine, tmp_path)
    done = in_new_process("topo", "--layout", "tp2", "--require", "nvlink", "--json", env=environ)
    assert done.returncode == code
    assert done.stderr.startswith(told)
    assert code == 2 or json.loads(done.stdout)["source"] == "NVML"


# -- nccl ------------------------------------------------------------------------------------------------------------


def nccl_log(transport: str, *, ranks: int = 2) -> str:
    lines = ["node1:100:150 [0] NCCL INFO Using network Socket", "node1:100:150 [0] NCCL INFO NCCL version 2.27.7"]
    for src in range(ranks):
        edge = f"{src}[{src}] -> {(src + 1) % ranks}[{(src + 1) % ranks}]"
        lines.append(f"node1:{100 + src}:150 [{src}] NCCL INFO Channel 00/0 : {edge} via {transport}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("transport", "layout", "verdict", "code"),
    [
        ("P2P/CUMEM/read", None, "ok", 0),
        ("P2P/CUMEM/read", "tp2", "ok", 0),
        ("P2P/CUMEM/read", "tp4", "no-evidence", 1),
        ("SHM/direct/direct", "tp2", "shm", 0),
        ("NET/Socket/0", None, "socket", 1),
        ("NET/FastSocket/0", None, "ok", 0),
    ],
)
def test_nccl_verdicts(run: Run, transport: str, layout: str | None, verdict: str, code: int) -> None:
    more = ["--layout", layout] if layout else []
    ran = run("nccl", write("nccl.log", nccl_log(transport)), "--json", *more)
    document = ran.document
    assert (ran.code, document["verdict"]) == (code, verdict)
    assert document["transports"] == {transport: 2}
    assert document["edges"][0] == {"src": 0, "dst": 1, "transports": [transport], "channels": 1}
    assert (document["network"], document["nccl_version"]) == ("Socket", "2.27.7")
    for finding in document["findings"]:
        assert set(finding) == {"cause", "evidence", "advice"}


def test_nccl_text_shows_the_evidence(run: Run) -> None:
    ran = run("nccl", write("nccl.log", nccl_log("NET/Socket/0")))
    lines = ran.out.splitlines()
    assert lines[:4] == [
        "verdict: socket",
        "transports: NET/Socket/0 x2",
        "ranks   transport     channels",
        "0 -> 1  NET/Socket/0  1",
    ]
    assert "  nccl.log:3: node1:100:150 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via NET/Socket/0" in lines


def test_nccl_puts_logs_together_and_reads_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    head, first, second = nccl_log("P2P/CUMEM").rsplit("\n", 3)[:3]
    write("a.log", f"{head}\n{first}\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{second}\n".encode())))
    ran = run("nccl", "a.log", "-", "--layout", "tp2", "--json")
    assert (ran.code, ran.document["transports"]) == (0, {"P2P/CUMEM": 2})


def test_nccl_without_evidence_says_how_to_get_it(run: Run) -> None:
    ran = run("nccl", write("empty.log", ""))
    assert (ran.code, ran.out.splitlines()[0]) == (1, "verdict: no-evidence")
    assert "NCCL_DEBUG=INFO" in ran.out
    assert "None" not in ran.out


@pytest.mark.parametrize("name", ["missing.log", "."])
def test_nccl_refuses_what_it_cannot_read(run: Run, name: str) -> None:
    ran = run("nccl", name)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("gpulayout: a file could not be read or written: ")
    assert f"'{name}'" in ran.err
