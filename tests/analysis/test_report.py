import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scalestudy.analysis import figures, report
from scalestudy.analysis.canvas import Figure
from scalestudy.analysis.report import write_report
from scalestudy.launch.folder import StudyFolder
from scalestudy.trainers.options import DdpOptions
from scalestudy.trainers.record import CUT_SHORT, Memory, Placement, RankError, RankReport, Record, Software
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Trial

DIGITS = Data(source="digits", channels=1, image_size=32, classes=10)


@pytest.fixture
def out(tmp_path: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]) -> Path:
    """A study of two trainers on 1 and 2 devices, thrice, with one trial that failed."""
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    for trainer, cost in (("torch-ddp", 1.0), ("tf-multiworker", 2.0)):
        for size in (1, 2):
            for repeat in range(3):
                trial = make_trial(trainer=trainer, world_size=size, repeat=repeat, data=DIGITS)
                record = make_record(trial, 0.1 * cost * size**0.5 * (1 + repeat / 100))
                folder.finish(folder.begin(trial), record)
    failed = make_trial(trainer="tf-multiworker", world_size=2, repeat=3)
    reason = "rank 0: ValueError: <script>alert(1)</script>"
    folder.finish(folder.begin(failed), make_record(failed, outcome="failed", reason=reason, reports=()))
    return folder.path


def test_the_report_is_one_file_that_needs_no_network(out: Path) -> None:
    html = write_report(out).html.read_text()
    assert html.count('src="data:image/svg+xml;base64,') == 7
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', html)
    assert "url(" not in html


def test_the_report_leads_with_the_answer_and_ends_with_the_reasons(out: Path) -> None:
    html = write_report(out).html.read_text()
    assert html.index("On 1 device, torch-ddp ran 2.00× as fast as tf-multiworker, but three") < html.index(
        "<h2>Tables</h2>"
    )
    assert "12 of 13 trials ended ok" in html
    assert "rank 0: ValueError: &lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "75 % of the time, not 95 %" in html
    # Throughputs of three repeats, and efficiencies, which have three at their reference too.
    assert re.search(r"<span class=\"i\">[\d.]+ – [\d.]+ \(75 %\)</span>", html)
    assert "% (90 %)</span>" in html


def test_the_tables_others_read_agree(out: Path) -> None:
    write_report(out)
    as_parquet, as_csv = pd.read_parquet(out / "results.parquet"), pd.read_csv(out / "results.csv")
    assert len(as_parquet) == len(as_csv) == 13
    assert as_csv.throughput_images_per_s.tolist() == pytest.approx(
        as_parquet.throughput_images_per_s.tolist(), nan_ok=True
    )


def test_every_figure_is_drawn_once_as_svg(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    savefig = Figure.savefig

    def counted(self: Figure, *args: Any, **options: Any) -> None:
        drawn.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", counted)
    write_report(out)
    names = {path.name for path in (out / "figures").iterdir()}
    expected = {"efficiency", "throughput_per_device", "speedup", "step_time", "memory", "set_up", "loss_curves"}
    assert names == {f"{name}.svg" for name in expected}
    assert len(drawn) == len(set(map(id, drawn))) == len(expected)


def test_png_is_written_where_it_is_asked_for_and_an_older_one_does_not_stay(out: Path) -> None:
    write_report(out, png=True)
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert names == {path.stem for path in (out / "figures").glob("*.svg")}
    write_report(out)
    assert not list((out / "figures").glob("*.png"))


def test_ways_to_run_a_trainer_have_figures_of_their_own(
    out: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    folder = StudyFolder(out)
    changes: list[dict[str, object]] = [{"execution": "compiled"}]
    changes += [{"options": DdpOptions(bucket_cap_mb=cap)} for cap in range(1, 9)]
    for change in changes:
        trial = make_trial(trainer="torch-ddp", world_size=2, data=DIGITS, **change)
        folder.finish(folder.begin(trial), make_record(trial, 0.1))
    html = write_report(out).html.read_text()
    assert {"ways", "compilation"} <= {path.stem for path in (out / "figures").glob("*.svg")}
    assert "torch-ddp bucket_cap_mb=8" in html
    # Eleven series: more than lines can be told apart, and the report says what it left out of them.
    assert "drawn in its usual one" in html


def test_every_workload_has_its_law_though_six_are_drawn(
    tmp_path: Path,
    make_trial: Callable[..., Trial],
    make_record: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven batch sizes on 1, 2, 4 and 8 devices, in steps that grow by 3 % a device."""
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    for batch in range(1, 8):
        for size in (1, 2, 4, 8):
            for repeat in range(2):
                trial = make_trial(world_size=size, per_device_batch=batch, repeat=repeat)
                record = make_record(trial, 0.1 * (1 + 0.03 * (size - 1)) * (1 + repeat / 1000))
                folder.finish(folder.begin(trial), record)
    # The table is what counts here, and drawing takes ten times as long.
    monkeypatch.setattr(report, "_draw", lambda *_: {})
    html = write_report(folder.path).html.read_text()
    table = html[html.index("Which world size to take") :]
    assert table.count("Amdahl: serial 0.03 ") == 7
    assert table.count("leaving out 8 devices, it missed them by 0.0%") == 7
    assert "too few world sizes" not in html
    assert table.count("nothing is said past 8 devices: a node ends there, and several were not measured") == 7
    assert table.count("4 from 8 devices at 3%: 6 repeats") == 7


def test_a_damaged_record_is_left_out_and_named(out: Path) -> None:
    damaged = sorted(out.glob("trials/*/record.json"))[0]
    damaged.write_text(damaged.read_text()[:100])
    written = write_report(out)
    assert [error.path for error in written.damaged] == [damaged]
    assert str(damaged) in written.html.read_text()
    assert len(pd.read_csv(out / "results.csv")) == 12


def test_a_trial_without_its_parts_stands_and_says_so_and_a_warm_ups_larger_peak_is_shown(
    out: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    folder = StudyFolder(out)
    oom = RankError(kind="oom", message="OutOfMemoryError: CUDA out of memory")
    for world_size, warm_up_mib in ((2, 900), (4, 300)):
        trial = make_trial(trainer="torch-ddp", world_size=world_size, repeat=3, data=DIGITS)
        record = make_record(trial, 0.1)
        reports = tuple(
            report.model_copy(
                update={
                    "missing": {"causes": oom if report.rank.rank == 1 else CUT_SHORT} if world_size == 2 else {},
                    "memory": Memory(peak_resident_bytes=1, peak_allocated_bytes=300 * 2**20),
                    "warm_up_memory": Memory(peak_resident_bytes=1, peak_allocated_bytes=warm_up_mib * 2**20),
                }
            )
            for report in record.reports
        )
        folder.finish(folder.begin(trial), record.model_copy(update={"reports": reports}))
    html = write_report(out).html.read_text()
    assert "14 of 15 trials ended ok" in html
    before_quoting = html[html.index("Before you quote these numbers") : html.index("<h2>Tables</h2>")]
    assert "torch-ddp world size 2 repeat 4 (the parts of a step: rank 1: OutOfMemoryError: CUDA out" in before_quoting
    assert html.count('<br><span class="i">warm-up 900</span>') == html.count(">warm-up ") == 1


def test_images_that_are_left_out_are_said_once(
    tmp_path: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    sentence = "/data/imgs: left out: 12 .tif, 1 folder without a class (__MACOSX)"
    for repeat in range(3):
        record = make_record(make_trial(repeat=repeat))
        first = record.reports[0].model_copy(update={"left_out": sentence})
        folder.finish(folder.begin(record.trial), record.model_copy(update={"reports": (first,)}))
    written = write_report(folder.path)
    assert written.left_out == [sentence]
    assert written.html.read_text(encoding="utf-8").count(sentence) == 1


def test_a_folder_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records there"):
        write_report(tmp_path)


def test_a_study_of_failures_alone_still_has_a_report(
    tmp_path: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    trial = make_trial()
    folder.finish(folder.begin(trial), make_record(trial, outcome="timeout", reason="too slow", reports=()))
    html = write_report(folder.path).html.read_text()
    assert "No trial ended ok" in html
    assert "too slow" in html


def test_every_trainer_has_its_own_colour_and_marker() -> None:
    assert set(TRAINERS) <= set(figures.COLOURS)
    assert len(set(figures.COLOURS.values())) == len(set(figures.MARKERS.values())) == len(figures.COLOURS)


def test_the_environment_says_where_every_rank_was_pinned(
    tmp_path: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    # Fourteen whole cores near the GPU, and as many CPUs on seven; then as an older record has it.
    places = [
        Placement(cpus=tuple(range(14)), cores=tuple(range(14)), numa_nodes=(0,), gpu_numa_nodes=(0,)),
        Placement(cpus=(*range(7), *range(112, 119)), cores=(*range(7),) * 2, numa_nodes=(0,), gpu_numa_nodes=(1,)),
    ]

    def told(report: RankReport, place: Placement | None) -> RankReport:
        software = Software(python="3", versions={}, settings={}, cpus=place.cpus if place else (4, 6), variables={})
        rank = report.rank.model_copy(update={"devices": place.cpus} if place and place in turns else {})
        return report.model_copy(update={"rank": rank, "software": software, "placement": place})

    # A lone rank takes another GPU in its next repeat.
    turns = [
        place.model_copy(update={"cpus": (cpu,), "cores": (cpu,), "gpu_numa_nodes": ()})
        for place, cpu in zip(places, (0, 1), strict=True)
    ]
    by_repeat: list[list[Placement | None]] = [[*places], [None], [turns[0]], [turns[1]]]
    for repeat, own in enumerate(by_repeat):
        trial = make_trial(world_size=len(own), repeat=repeat)
        record = make_record(trial)
        reports = tuple(told(report, place) for report, place in zip(record.reports, own, strict=True))
        folder.finish(folder.begin(trial), record.model_copy(update={"reports": reports}))
    html = write_report(folder.path).html.read_text()
    shared = "shared with another rank, NUMA node 0"
    assert f"local rank 0 of 2: pinned to CPU 0-13 (14 cores, {shared}; GPU on node 0)" in html
    assert f"local rank 1 of 2: pinned to CPU 0-6,112-118 (7 cores, {shared}; GPU on another, node 1)" in html
    on_gpus = "GPU 0, pinned to CPU 0 (1 core, NUMA node 0) or GPU 1, pinned to CPU 1 (1 core, NUMA node 0)"
    assert f"local rank 0 of 1: pinned to CPU 4,6 or {on_gpus};" in html
    assert "had ranks share the hardware threads of a core" in html
    assert "had ranks on CPUs of another NUMA node than their GPU" in html
