"""Studies on a real Ray cluster of two raylets on this host: real jobs, killed actors, nodes and drivers."""

import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scalestudy.trainers.record import Record

pytestmark = pytest.mark.slow

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
RAY = str(Path(sys.executable).with_name("ray"))
# tests/system/conftest.py has it; tests import no conftest.
RayCluster = Any
WriteStudy = Callable[..., Path]
Records = Callable[[Path], list[Record]]
NoRankRuns = Callable[[Path], bool]
TWO = {"trainers": "torch-ddp", "models": "cnn", "devices_per_node": 2, "threads_per_device": 1}
LONG = {"window_s": 0.5, "windows": 10}


@pytest.fixture
def cluster(raylets: RayCluster) -> Iterator[RayCluster]:
    """Return the cluster, and make sure that the test left nothing reserved and nothing running on it."""
    yield raylets
    raylets.until(raylets.idle, 30)
    assert not workers()


def workers() -> list[psutil.Process]:
    """Return the processes of ranks; all tests' ranks have gone before the next begins."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if "scalestudy.trainers.worker" in (process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def measuring(out: Path, trial: str = "") -> bool:
    """Whether a rank of a trial has told how far it is."""
    return any(out.glob(f"trials/*{trial}*/progress.jsonl"))


@pytest.mark.horovod
def test_a_study_of_both_frameworks_over_one_and_two_nodes_by_ray_job_submit(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    write_study(
        **{
            **TWO,
            "trainers": ["torch-ddp", "tf-multiworker", "horovod-tf"],
            "models": [{"name": "cnn", "data": "digits"}],
            "world_sizes": [2, 4],
        }
    )
    out = tmp_path / "out"
    run = [sys.executable, "-m", "scalestudy.launch", "run", "s.yaml", "--launcher", "ray", "--out", out]
    told = cluster.tell(RAY, "job", "submit", "--working-dir", tmp_path, "--", *run)
    assert told.count(": ok, ") == 6
    found = records(out)
    assert len(found) == 6
    for record in found:
        assert record.outcome == "ok", record.reason
        assert record.environment.launcher == "ray"
        assert record.environment.scheduler["Ray job"]
        places = [(report.rank.node_rank, report.rank.local_rank) for report in record.reports]
        assert places == [(rank // 2, rank % 2) for rank in range(record.trial.world_size)]
        assert len({digest for report in record.reports for digest in report.parameter_checksums}) == 1
    logs = list(out.glob("trials/*/rank-*.log"))
    assert len(logs) == 3 * (2 + 4)
    assert (out / "report.html").stat().st_size > 100_000


def test_every_rank_sees_the_gpus_of_its_node_that_the_trial_was_given(
    cluster: RayCluster, write_study: WriteStudy, tmp_path: Path
) -> None:
    interpreter = tmp_path / "interpreter"
    interpreter.write_text("#!/bin/bash\necho $RANK $LOCAL_RANK $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS\n")
    interpreter.chmod(0o755)
    study = write_study(**TWO, world_sizes=[4], environments={"torch-ddp": str(interpreter)}, device="gpu")
    cluster.tell(SCALESTUDY, "run", study, "--launcher", "ray", "--out", tmp_path / "out", expected=1)
    told = [path.read_text() for path in sorted((tmp_path / "out").glob("trials/*/rank-*.log"))]
    assert told == [f"{rank} {rank % 2} 0,1 1\n" for rank in range(4)]


def test_a_submitted_study_is_followed_and_its_results_come_home(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(**TWO, world_sizes=[1, 2], ray={"results": str(tmp_path / "head")})
    home = tmp_path / "home"
    told = cluster.tell(SCALESTUDY, "submit", study, "--launcher", "ray", "--out", home)
    assert "[2/2]" in told
    assert f"2 trials new in {home}" in told
    assert [record.outcome for record in records(home)] == ["ok", "ok"]
    assert (home / "report.html").exists()
    assert (home / "results.csv").read_text() == (tmp_path / "head" / "s" / "results.csv").read_text()
    assert re.search(r"raysubmit_\S+ +s.yaml +succeeded", cluster.tell(SCALESTUDY, "status", home))
    # Again: the cluster has the records, nothing is measured twice and nothing comes twice.
    assert "2 done before, 0 to run" in cluster.tell(SCALESTUDY, "submit", study, "--launcher", "ray", "--out", home)
    assert f"0 trials new in {home}" in cluster.tell(SCALESTUDY, "fetch", home)
    shutil.rmtree(next((home / "trials").iterdir()))
    assert f"1 trials new in {home}" in cluster.tell(SCALESTUDY, "fetch", home)


def test_without_a_dashboard_submit_names_the_address(
    write_study: WriteStudy, tmp_path: Path, cluster: RayCluster
) -> None:
    study = write_study(**TWO, world_sizes=[1])
    command = ["submit", study, "--launcher", "ray", "--address", "http://127.0.0.1:9", "--out", tmp_path / "out"]
    told = cluster.tell(SCALESTUDY, *command, expected=2)
    assert "--address: 'http://127.0.0.1:9': no Ray dashboard answers" in told
    assert len(told.splitlines()) == 1


def test_a_killed_actor_costs_its_trial_and_the_study_goes_on(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(**TWO, world_sizes=[2], repeats=2, measurement=LONG)
    out = tmp_path / "out"
    driver = cluster.start(SCALESTUDY, "run", study, "--launcher", "ray", "--out", out)
    cluster.until(lambda: measuring(out))
    actor = next(p for p in psutil.process_iter(["cmdline"]) if "ray::RankActor" in " ".join(p.info["cmdline"] or []))
    actor.kill()
    assert driver.wait(120) == 1
    failed, ok = sorted(records(out), key=lambda record: record.trial.repeat)
    assert failed.outcome == "failed"
    assert re.search(r"rank \d was killed by signal 9.*actor", failed.reason or ""), failed.reason
    assert not failed.retry
    assert ok.outcome == "ok", ok.reason


def test_a_node_that_dies_costs_its_trial_which_runs_again_when_it_is_back(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(**TWO, world_sizes=[2, 4], measurement=LONG, seed=2)
    out = tmp_path / "out"
    command = [SCALESTUDY, "run", study, "--launcher", "ray", "--out", out]
    driver = cluster.start(*command)
    cluster.until(lambda: measuring(out, "-w4-"))
    cluster.kill_node()
    try:
        assert driver.wait(180) == 1
        by_size = {record.trial.world_size: record for record in records(out)}
        assert by_size[2].outcome == "ok", by_size[2].reason
        assert re.fullmatch(r"node \S+ \(\w{8}\) failed under the trial", by_size[4].reason or ""), by_size[4].reason
        assert (by_size[4].outcome, by_size[4].retry) == ("failed", True)
    finally:
        cluster.boot_node()
    cluster.tell(*command)
    assert [record.outcome for record in records(out)] == ["ok", "ok"]


def test_a_killed_driver_leaves_no_rank_and_goes_on_when_started_again(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(**TWO, world_sizes=[2], repeats=2, measurement=LONG)
    out = tmp_path / "out"
    command = [SCALESTUDY, "run", study, "--launcher", "ray", "--out", out]
    driver = cluster.start(*command)
    cluster.until(lambda: measuring(out))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    cluster.until(lambda: not workers(), 30)
    cluster.until(cluster.idle, 30)
    cluster.tell(*command)
    assert [record.outcome for record in records(out)] == ["ok", "ok"]
    assert len(list(out.glob("trials/*.unfinished-1"))) == 1


def test_a_trial_over_its_deadline_is_a_timeout_that_says_where_its_ranks_stand(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(**TWO, world_sizes=[2], measurement={"deadline_s": 8, "window_s": 60})
    cluster.tell(SCALESTUDY, "run", study, "--launcher", "ray", "--out", tmp_path / "out", expected=1)
    [record] = records(tmp_path / "out")
    assert record.outcome == "timeout", record.reason
    assert re.search(r"deadline_s = 8: ranks? [01–]+ (is|are) in \w+ \(\S+\.py:\d+ \w+", record.reason or ""), (
        record.reason
    )
    for rank in range(2):
        [log] = (tmp_path / "out").glob(f"trials/*/rank-{rank}.log")
        assert "(most recent call first)" in log.read_text()


def test_what_does_not_fit_is_skipped_with_the_reason_and_waits_as_long_as_it_may(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    study = write_study(**TWO, world_sizes=[1, 8])
    cluster.tell(SCALESTUDY, "run", study, "--launcher", "ray", "--out", out)
    by_size = {record.trial.world_size: record for record in records(out)}
    assert by_size[1].outcome == "ok", by_size[1].reason
    assert (by_size[8].outcome, by_size[8].retry) == ("skipped", True)
    assert by_size[8].reason == "needs 4 nodes with 2 cpu devices, 2 are there"
    # With an autoscaler it would wait for nodes to be started.
    write_study(**TWO, world_sizes=[1, 8], ray={"scale_up_s": 2})
    cluster.tell(SCALESTUDY, "run", study, "--launcher", "ray", "--out", out)
    [waited] = [record for record in records(out) if record.trial.world_size == 8]
    assert waited.reason == (
        "needs 4 nodes with 2 CPUs, and none came free within 2 s; "
        "the cluster's nodes have 2 CPUs and 2 GPUs, 2 CPUs and 2 GPUs"
    )


def test_nodes_that_an_autoscaler_has_yet_to_start_are_taken_from_the_study(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    # Larger than any node that is there.
    fields = {**TWO, "devices_per_node": 4, "world_sizes": [4], "device": "gpu"}
    run = ["run", write_study(**fields), "--launcher", "ray", "--out", tmp_path / "out"]
    assert "devices_per_node: 4, but a node has 2 gpu devices" in cluster.tell(SCALESTUDY, *run, expected=2)
    write_study(**fields, ray={"scale_up_s": 2})
    cluster.tell(SCALESTUDY, *run)
    [record] = records(tmp_path / "out")
    assert (record.outcome, record.retry) == ("skipped", True)
    assert (record.reason or "").startswith("needs 1 nodes with 4 CPUs and 4 GPUs, and none came free within 2 s")


def test_an_environment_that_cannot_be_built_fails_its_trial_with_rays_words(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(**TWO, world_sizes=[1], ray={"runtime_env": {"conda": "no-such-environment"}})
    cluster.tell(SCALESTUDY, "run", study, "--launcher", "ray", "--out", tmp_path / "out", expected=1)
    [record] = records(tmp_path / "out")
    assert record.outcome == "failed"
    assert re.search("the ranks could not be started: .*(runtime|conda)", record.reason or ""), record.reason


def test_two_studies_at_once_share_neither_ports_nor_devices_nor_records(
    cluster: RayCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        study = write_study(folder=tmp_path / name, **TWO, world_sizes=[1], repeats=2, measurement=LONG)
        runs.append(cluster.start(SCALESTUDY, "run", study, "--launcher", "ray", "--out", tmp_path / name / "out"))
    assert [run.wait(180) for run in runs] == [0, 0]
    spans = []
    for name in ("one", "two"):
        found = records(tmp_path / name / "out")
        assert [record.outcome for record in found] == ["ok", "ok"]
        for record in found:
            [report] = record.reports
            assert report.software is not None
            spans.append((name, report.windows[0].start_s, report.windows[-1].end_s, set(report.software.cpus)))
    together = [(a, b) for a in spans for b in spans if a[0] < b[0] and a[1] < b[2] and b[1] < a[2]]
    assert together, "the studies never ran at the same time"
    for a, b in together:
        assert not a[3] & b[3], "two ranks on one CPU"
