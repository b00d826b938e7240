from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from pytest_gpulayout.errors import DevicesBusy, ServerError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.occupancy import (
    GpuProcess,
    GpuUse,
    Occupancy,
    OccupancyReport,
    await_idle_devices,
    foreign_processes,
    judge_occupancy,
    memory_text,
)
from pytest_gpulayout.testing import FakeGpuProcess, FakeGpuProcesses
from pytest_gpulayout.topology import Device

GIB = 2**30
RANKS = {0: 100, 1: 101}
TITLES = {99: "python -m vllm", 100: "VLLM::Worker_TP0", 101: "VLLM::Worker_TP1", 102: "VLLM::EngineCore"}
DEVICES = tuple(Device(index, uuid=f"GPU-{index}") for index in range(2))

On = Mapping[int, Sequence[int | tuple[int, int | None]]]


def occupied(on: On, *, used: Mapping[int, int | None] | None = None, unlisted: Sequence[int] = ()) -> Occupancy:
    """Four GPUs. :param on: by GPU, process ids or (process id, memory). :param used: memory by GPU."""
    gpus = tuple(GpuUse(i, f"GPU-{i}", (used or {}).get(i, 0), i not in unlisted) for i in range(4))
    found = [(gpu, who if isinstance(who, tuple) else (who, GIB)) for gpu, all_of in on.items() for who in all_of]
    return Occupancy(gpus, tuple(GpuProcess(f"GPU-{gpu}", pid, memory) for gpu, (pid, memory) in found))


NOBODY = occupied({})


def judge(now: Occupancy, before: Occupancy = NOBODY, devices: Sequence[Device] = DEVICES) -> OccupancyReport:
    return judge_occupancy(before, now, devices, RANKS, TITLES, lambda pid: f"program-{pid}")


def texts(report: OccupancyReport) -> list[str]:
    return [str(violation) for violation in report.violations]


# -- process ids are visible -------------------------------------------------------------------------------------


def test_each_rank_on_its_gpu() -> None:
    report = judge(occupied({0: [100], 1: [101], 3: [7]}))

    assert (report.ok, report.proved_by, report.not_proved, report.remarks) == (True, "process list", (), ())
    assert [(found.rank, found.gpu.index, found.pid, found.memory_bytes) for found in report.ranks] == [
        (0, 0, 100, GIB),
        (1, 1, 101, GIB),
    ]
    assert report.summary() == "each rank on its GPU and no other (process list)"


@pytest.mark.parametrize(
    ("on", "violations"),
    [
        (
            {0: [101], 1: [100]},
            [
                "rank 0 (pid 100 VLLM::Worker_TP0) has no context on GPU 0 (GPU-0)",
                "rank 1 (pid 101 VLLM::Worker_TP1) has no context on GPU 1 (GPU-1)",
                "rank 1 (pid 101 VLLM::Worker_TP1) holds a context on GPU 0 (GPU-0), 1.0 GiB; "
                "its own is GPU 1 (GPU-1)",
                "rank 0 (pid 100 VLLM::Worker_TP0) holds a context on GPU 1 (GPU-1), 1.0 GiB; "
                "its own is GPU 0 (GPU-0)",
            ],
        ),
        ({0: [100]}, ["rank 1 (pid 101 VLLM::Worker_TP1) has no context on GPU 1 (GPU-1)"]),
        (
            {0: [100, (101, 500 * 2**20)], 1: [101]},
            ["rank 1 (pid 101 VLLM::Worker_TP1) holds a context on GPU 0 (GPU-0), 500 MiB; its own is GPU 1 (GPU-1)"],
        ),
        (
            {0: [100], 1: [101], 2: [(101, None)]},
            [
                "rank 1 (pid 101 VLLM::Worker_TP1) holds a context on GPU 2 (GPU-2), memory unknown; "
                "its own is GPU 1 (GPU-1)"
            ],
        ),
        (
            {0: [100], 1: [101], 3: [102, 99]},
            [
                "pid 102 VLLM::EngineCore holds a context on GPU 3 (GPU-3) outside the layout, 1.0 GiB",
                "pid 99 python -m vllm holds a context on GPU 3 (GPU-3) outside the layout, 1.0 GiB",
            ],
        ),
        (
            {0: [100], 1: [101, 7]},
            ["pid 7 program-7 is not of the server and computes on GPU 1 (GPU-1), 1.0 GiB"],
        ),
        (
            {2: [102]},
            [
                "rank 0 (pid 100 VLLM::Worker_TP0) has no context on GPU 0 (GPU-0)",
                "rank 1 (pid 101 VLLM::Worker_TP1) has no context on GPU 1 (GPU-1)",
                "pid 102 VLLM::EngineCore holds a context on GPU 2 (GPU-2) outside the layout, 1.0 GiB",
            ],
        ),
    ],
    ids=["swapped", "missing", "on another rank's", "outside", "not a rank", "foreign", "only the engine"],
)
def test_processes_in_wrong_places(on: On, violations: list[str]) -> None:
    report = judge(occupied(on))

    assert report.proved_by == "process list"
    assert texts(report) == violations
    assert not report.ok


def test_engine_core_on_a_chosen_gpu_is_a_remark() -> None:
    report = judge(occupied({0: [100, 102], 1: [101]}))

    assert report.ok
    assert report.remarks == ("pid 102 VLLM::EngineCore is no rank and holds a context on GPU 0 (GPU-0), 1.0 GiB",)


def test_with_one_rank_the_engine_core_is_the_rank() -> None:
    ranks, titles = {0: 100}, {99: "python", 100: "VLLM::EngineCore"}

    right, wrong = (
        judge_occupancy(NOBODY, occupied(on), DEVICES[:1], ranks, titles) for on in ({0: [100]}, {0: [100], 1: [100]})
    )

    assert (right.ok, right.remarks) == (True, ())
    assert texts(wrong) == [
        "rank 0 (pid 100 VLLM::EngineCore) holds a context on GPU 1 (GPU-1), 1.0 GiB; its own is GPU 0 (GPU-0)"
    ]


@pytest.mark.parametrize("elsewhere", [1, 2, 3])
@pytest.mark.parametrize(
    ("pid", "who"),
    [
        (100, "rank 0 (pid 100 VLLM::Worker) holds a context on {}, 500 MiB; its own is GPU 0 (GPU-0)"),
        (98, "pid 98 VLLM::EngineCore holds a context on {} outside the layout, 500 MiB"),
        (99, "pid 99 python -m vllm holds a context on {} outside the layout, 500 MiB"),
    ],
    ids=["rank", "engine", "front end"],
)
def test_tp1_on_a_machine_with_more_gpus_holds_no_context_elsewhere(elsewhere: int, pid: int, who: str) -> None:
    ranks, titles = {0: 100}, {99: "python -m vllm", 98: "VLLM::EngineCore", 100: "VLLM::Worker"}

    def judge_tp1(on: On) -> OccupancyReport:
        return judge_occupancy(NOBODY, occupied(on), DEVICES[:1], ranks, titles)

    alone = judge_tp1({0: [100]})
    assert (alone.ok, alone.not_proved, alone.proved_by) == (True, (), "process list")
    assert texts(judge_tp1({0: [100], elsewhere: [(pid, 500 * 2**20)]})) == [
        who.format(f"GPU {elsewhere} (GPU-{elsewhere})")
    ]


def test_tp1_in_a_container_that_hides_process_ids_holds_no_context_elsewhere() -> None:
    now = occupied({0: [9001], 3: [(9001, 500 * 2**20)]})

    report = judge_occupancy(NOBODY, now, DEVICES[:1], {0: 100}, {100: "VLLM::Worker"})

    assert report.proved_by == "new processes"
    assert texts(report) == ["rank 0 (pid 9001) holds a context on GPU 3 (GPU-3), 500 MiB; its own is GPU 0 (GPU-0)"]


def test_engines_and_their_coordinator_are_no_ranks() -> None:
    devices = tuple(Device(index, uuid=f"GPU-{index}") for index in range(4))
    titles = {1: "VLLM::DPCoordinator", 10: "VLLM::EngineCore_DP0", 20: "VLLM::EngineCore_DP1"}
    titles |= {11: "VLLM::Worker_TP0", 12: "VLLM::Worker_TP1", 21: "VLLM::Worker_TP0", 22: "VLLM::Worker_TP1"}
    ranks = {0: 11, 1: 12, 2: 21, 3: 22}

    right = judge_occupancy(NOBODY, occupied({0: [11], 1: [12], 2: [21], 3: [22]}), devices, ranks, titles)
    first_gpu = judge_occupancy(
        NOBODY, occupied({0: [11, 21, 20], 1: [12], 2: [21], 3: [22]}), devices, ranks, titles
    )

    assert (right.ok, right.remarks) == (True, ())
    assert texts(first_gpu) == [
        "rank 2 (pid 21 VLLM::Worker_TP0) holds a context on GPU 0 (GPU-0), 1.0 GiB; its own is GPU 2 (GPU-2)"
    ]
    assert first_gpu.remarks == (
        "pid 20 VLLM::EngineCore_DP1 is no rank and holds a context on GPU 0 (GPU-0), 1.0 GiB",
    )


def test_devices_in_another_order_than_indices() -> None:
    report = judge(occupied({2: [100], 1: [101]}), devices=(Device(2, uuid="GPU-2"), Device(1, uuid="GPU-1")))

    assert report.ok
    assert [found.gpu.index for found in report.ranks] == [2, 1]


@pytest.mark.parametrize(("indices", "ok"), [((0, 1), True), ((1, 0), False)])
def test_a_topology_without_uuids_names_gpus_by_index(indices: tuple[int, ...], ok: bool) -> None:
    assert judge(occupied({0: [100], 1: [101]}), devices=[Device(index) for index in indices]).ok is ok


def test_a_gpu_that_the_driver_does_not_show() -> None:
    report = judge(occupied({0: [100], 1: [101]}), devices=(DEVICES[0], Device(5, uuid="GPU-of-another-machine")))

    assert texts(report) == [
        "rank 1 belongs on GPU 5 (GPU-of-another-machine), which is not among the GPUs that the driver shows"
    ]


def test_a_gpu_without_a_list_is_judged_by_its_memory() -> None:
    now = occupied({0: [100]}, used={1: GIB}, unlisted=[1, 3])

    report = judge(now)

    assert (report.ok, report.proved_by) == (True, "process list")
    assert report.not_proved == (
        "GPU 1 (GPU-1): that nobody else computes there; the driver does not list its processes",
        "GPU 3 (GPU-3): that the server has no context there",
    )
    assert report.summary() == "each rank on its GPU and no other as far as it can be seen (process list)"


# -- process ids are those of the host ---------------------------------------------------------------------------


def test_new_processes_one_for_each_rank() -> None:
    report = judge(occupied({0: [9001], 1: [9002], 3: [8000]}), occupied({3: [8000]}))

    assert (report.ok, report.proved_by, report.not_proved) == (True, "new processes", ())
    assert [found.pid for found in report.ranks] == [9001, 9002]
    assert report.remarks == (
        "the driver lists process ids of the host, unknown here: docker run --pid=host shows them",
    )


@pytest.mark.parametrize(
    ("on", "violations"),
    [
        ({0: [9001]}, ["rank 1 (pid 101 VLLM::Worker_TP1) has no context on GPU 1 (GPU-1)"]),
        (
            {2: [9001], 3: [9002]},
            [
                "rank 0 (pid 100 VLLM::Worker_TP0) has no context on GPU 0 (GPU-0)",
                "rank 1 (pid 101 VLLM::Worker_TP1) has no context on GPU 1 (GPU-1)",
            ],
        ),
        (
            {0: [9001], 1: [9001]},
            [
                "rank 1 (pid 101 VLLM::Worker_TP1) has no context on GPU 1 (GPU-1)",
                "rank 0 (pid 9001) holds a context on GPU 1 (GPU-1), 1.0 GiB; its own is GPU 0 (GPU-0)",
            ],
        ),
        (
            {0: [9001, (9002, 2**29)], 1: [9002]},
            ["rank 1 (pid 9002) holds a context on GPU 0 (GPU-0), 512 MiB; its own is GPU 1 (GPU-1)"],
        ),
        (
            {0: [9001], 1: [9002], 3: [9002]},
            ["rank 1 (pid 9002) holds a context on GPU 3 (GPU-3), 1.0 GiB; its own is GPU 1 (GPU-1)"],
        ),
        (
            {0: [9001, 8000], 1: [9002]},
            ["pid 8000 program-8000 is not of the server and computes on GPU 0 (GPU-0), 1.0 GiB"],
        ),
    ],
    ids=["missing", "elsewhere", "one for two", "on another rank's", "outside", "there before"],
)
def test_new_processes_in_wrong_places(on: On, violations: list[str]) -> None:
    report = judge(occupied(on), occupied({0: [8000]}))

    assert report.proved_by == "new processes"
    assert texts(report) == violations


def test_what_new_processes_cannot_show() -> None:
    report = judge(occupied({0: [9001, (9003, None)], 1: [9002], 2: [9004]}))

    assert report.ok
    assert report.ranks[0].pid == 9001
    assert report.not_proved == (
        "GPU 0 (GPU-0): that all 2 new processes (pid 9001, 9003) are the server's",
        "GPU 2 (GPU-2): that its new process (pid 9004) is not the server's",
    )


# -- nothing is listed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unlisted", [(0, 1, 2, 3), ()], ids=["no lists", "empty lists"])
def test_memory_has_grown_on_each_gpu(unlisted: tuple[int, ...]) -> None:
    before = occupied({}, used={0: GIB}, unlisted=unlisted)

    report = judge(occupied({}, used={0: GIB + 2**28, 1: 2**28}, unlisted=unlisted), before)

    assert (report.ok, report.proved_by) == (True, "device memory")
    assert [found.pid for found in report.ranks] == [None, None]
    assert report.not_proved == (
        "GPU 2 (GPU-2): that the server has no context there",
        "GPU 3 (GPU-3): that the server has no context there",
    )
    assert report.summary() == (
        "memory in use has grown on the GPU of each rank; other GPUs not proved (device memory)"
    )


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (0, 0, "0 MiB"),
        (GIB, GIB + 2**28 - 2**20, "255 MiB"),
        (2 * GIB, GIB, "-1.0 GiB"),
        (None, GIB, "that the driver does not tell it"),
        (GIB, None, "that the driver does not tell it"),
    ],
)
def test_memory_that_proves_nothing(before: int | None, now: int | None, found: str) -> None:
    report = judge(occupied({}, used={0: GIB, 1: now}), occupied({}, used={0: 0, 1: before}))

    assert texts(report) == [f"rank 1: memory in use on GPU 1 (GPU-1) must have grown by 256 MiB, found {found}"]
    assert report.summary() == f"{report.violations[0]} (device memory)"


def test_somebody_who_stayed_is_seen_without_new_processes() -> None:
    earlier = occupied({0: [8000]}, used={0: GIB, 1: 0})

    report = judge(occupied({0: [8000]}, used={0: 2 * GIB, 1: GIB}), earlier)

    assert texts(report) == ["pid 8000 program-8000 is not of the server and computes on GPU 0 (GPU-0), 1.0 GiB"]


def test_nothing_at_all_is_no_pass() -> None:
    report = judge(Occupancy(), Occupancy())

    assert len(report.violations) == 2
    assert report.summary().endswith("and 1 more (device memory)")


# -- before the start --------------------------------------------------------------------------------------------


def test_foreign_processes_are_those_on_the_devices() -> None:
    snapshot = occupied({0: [7], 1: [7, 8], 2: [9]})

    assert [(found.uuid, found.pid) for found in foreign_processes(snapshot, DEVICES)] == [
        ("GPU-0", 7),
        ("GPU-1", 7),
        ("GPU-1", 8),
    ]
    assert foreign_processes(snapshot, [Device(3), Device(9, uuid="GPU-9")]) == ()


def await_idle(source: FakeGpuProcesses, wait_s: float = 0, lines: list[str] | None = None) -> Occupancy:
    return await_idle_devices(
        source,
        Layout(tp=2),
        [replace(device, uuid=None) for device in DEVICES],
        wait_s=wait_s,
        clock=source.clock,
        sleep=source.sleep,
        progress=(lines if lines is not None else []).append,
    )


def test_idle_devices_are_taken_at_once_whatever_runs_elsewhere() -> None:
    source = FakeGpuProcesses(others=[FakeGpuProcess(3)])

    found = await_idle(source, wait_s=600)

    assert [process.pid for process in found.processes] == [4242]
    assert source.now_s == 0


@pytest.mark.parametrize(("leaves_after_s", "wait_s"), [(4, 0), (45, 60)], ids=["grace", "wait"])
def test_others_who_leave_in_time(leaves_after_s: float, wait_s: float) -> None:
    source = FakeGpuProcesses(others=[FakeGpuProcess(1, leaves_after_s=leaves_after_s)])
    lines: list[str] = []

    assert await_idle(source, wait_s, lines).processes == ()
    assert source.now_s == leaves_after_s
    limit = max(wait_s, 5)
    assert lines[2] == f"tp2: waiting for pid 4242 python train.py (user bob) to leave the GPUs, 1 of {limit:.0f} s"


def test_others_who_stay() -> None:
    source = FakeGpuProcesses(
        others=[FakeGpuProcess(0, memory_bytes=61 * 2**29), FakeGpuProcess(1, 77, None, name=""), FakeGpuProcess(2)]
    )

    with pytest.raises(DevicesBusy) as caught:
        await_idle(source)

    assert str(caught.value).splitlines() == [
        "idle GPUs were required for layout tp2, found other processes on them",
        "  GPU 0 (GPU-00000000-0000-0000-0000-000000000000): pid 4242 python train.py (user bob), 30.5 GiB",
        "  GPU 1 (GPU-00000000-0000-0000-0000-000000000001): pid 77 (not visible from here), memory unknown",
        "  in the process list of the NVIDIA driver, 5 s after they were first looked for",
        "  end them, choose other GPUs with --gpu-devices, or wait for them with --gpu-wait=600",
    ]
    assert caught.value.pids == (4242, 77)
    assert isinstance(caught.value, ServerError)
    assert source.now_s == 5


def test_whoever_has_waited_is_told_to_wait_longer() -> None:
    source = FakeGpuProcesses(others=[FakeGpuProcess(0), FakeGpuProcess(0, 5)])
    lines: list[str] = []

    with pytest.raises(DevicesBusy, match=r"wait for them with --gpu-wait=1800$"):
        await_idle(source, wait_s=900, lines=lines)
    assert lines[0].startswith("tp2: waiting for pid 4242 python train.py (user bob) and 1 more to leave the GPUs")


@pytest.mark.parametrize(
    ("memory_bytes", "text"),
    [(None, "memory unknown"), (0, "0 MiB"), (500 * 2**20, "500 MiB"), (2**30, "1.0 GiB"), (61 * 2**29, "30.5 GiB")],
)
def test_memory_text(memory_bytes: int | None, text: str) -> None:
    assert memory_text(memory_bytes) == text
