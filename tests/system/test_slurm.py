"""Studies on a real Slurm: munged, slurmctld and four slurmd on this host; nodes killed, jobs preempted, cancelled."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scalestudy.launch.launcher import Exit
from scalestudy.launch.outcome import ending
from scalestudy.launch.slurm import SlurmLauncher
from scalestudy.launch.study import Container
from scalestudy.trainers.record import Record
from scalestudy.trainers.trial import Measurement, Trial

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCALE = ROOT / "slurm" / "scale.sh"
RAY = ROOT / "slurm" / "ray.sh"
SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
# tests/system/conftest.py has it; tests import no conftest.
SlurmCluster = Any
WriteStudy = Callable[..., Path]
Records = Callable[[Path], list[Record]]
NoRankRuns = Callable[[Path], bool]


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


# The launcher, in an allocation that the test holds


@pytest.fixture
def launcher(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SlurmLauncher]]:
    """Return a maker of launchers on all four nodes; `script` stands where the worker's interpreter would."""
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
    said = cluster.tell("salloc", "--no-shell", "--no-kill", "--nodes=4", "--exclusive", "--gpus-per-node=2", "--mem=0")
    [job] = re.findall(r"Granted job allocation (\d+)", said)
    environ = {
        "SLURM_CONF": cluster.environ["SLURM_CONF"],
        "SLURM_JOB_ID": job,
        "SLURM_JOB_CPUS_PER_NODE": "4(x4)",
        "SLURM_GPUS_ON_NODE": "2",
        # What an sbatch --ntasks=16 would leave behind, and a step must not follow.
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "4",
    }
    folder = Path(cluster.folder)

    def make(script: str, container: Container | None = None) -> SlurmLauncher:
        interpreter = folder / "interpreter"
        interpreter.write_text(f"#!/bin/bash\nfolder=$3\n{script}\n")
        interpreter.chmod(0o755)
        own = {} if container else {"torch-ddp": str(interpreter)}
        found = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return SlurmLauncher(own, container, environ | found)

    yield make
    cluster.tell("scancel", job)


Launch = Callable[..., Exit]


@pytest.fixture
def launch(launcher: Callable[..., SlurmLauncher], tmp_path: Path, make_trial: Callable[..., Trial]) -> Launch:
    def launch(script: str, deadline_s: float = 60, container: Container | None = None, **changes: object) -> Exit:
        trial = make_trial(**({"world_size": 4, "devices_per_node": 2} | changes))
        return launcher(script, container).run(trial, tmp_path, deadline_s, lambda: None)

    return launch


def test_tasks_fill_node_after_node_and_see_all_of_the_nodes_gpus(launch: Launch, tmp_path: Path) -> None:
    ended = launch(
        "echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS $SLURM_NTASKS",
        world_size=3,
        device="gpu",
        threads_per_device=2,
    )
    assert ended == Exit(codes=(0, 0, 0), timed_out=False, first_failed=None)
    told = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(3)]
    assert told == ["0 0 node1 0,1 2 3\n", "1 1 node1 0,1 2 3\n", "2 0 node2 0,1 2 3\n"]


def test_a_task_that_fails_takes_the_others_with_it(launch: Launch) -> None:
    # exec: what gets the signal is the task, and no child of it that a shell would tell of by an exit code.
    ended = launch("[ $SLURM_PROCID = 3 ] && exit 7; exec sleep 60")
    assert ended == Exit(codes=(-15, -15, -15, 7), timed_out=False, first_failed=3)
    assert launch("[ $SLURM_PROCID = 1 ] && kill -SEGV $$; sleep 60").codes[1] == -11


def test_the_deadline_ends_all_tasks_and_what_they_started(
    launch: Launch, tmp_path: Path, cluster: SlurmCluster
) -> None:
    ended = launch("sleep 61 & echo $! > $folder/child-$SLURM_PROCID; wait", deadline_s=2)
    assert ended.timed_out
    for rank in range(4):
        pid = int((tmp_path / f"child-{rank}").read_text())
        cluster.until(lambda pid=pid: not psutil.pid_exists(pid), 15)
    assert ".0" not in cluster.tell("squeue", "--steps", "--noheader", "--format=%i").replace(".extern", "")


def test_at_the_deadline_every_task_says_where_it_stands(
    launch: Launch, tmp_path: Path, make_trial: Callable[..., Trial]
) -> None:
    long = Measurement(window_s=60, windows=2, deadline_s=10, cause_windows=0)
    trial = make_trial(world_size=4, devices_per_node=2, measurement=long)
    (tmp_path / "trial.json").write_text(trial.model_dump_json(by_alias=True))
    # The last one never comes.
    script = f'[ $SLURM_PROCID = 3 ] && exec sleep 61; exec {sys.executable} "$@"'
    ended = launch(script, deadline_s=10, measurement=long)
    assert ended.timed_out
    reason = ending(trial, ended, (), tmp_path).reason or ""
    where = r"in rendezvous \(torch_ddp.py:\d+ __init__, in torch/distributed/\S+ \w+\)"
    assert re.search(rf"rank 0 is {where}; ranks 1–2 are {where}; rank 3 never began$", reason), reason


def test_a_program_that_is_not_there_fails_the_trial_with_its_log(launch: Launch) -> None:
    ended = launch("exec /no/such/python", world_size=1)
    assert (ended.codes, ended.first_failed) == ((127,), 0)


def test_more_than_a_node_has_is_slurms_own_message(launch: Launch) -> None:
    with pytest.raises(OSError, match="More processors requested than permitted|configuration is not available"):
        launch("true", world_size=5, devices_per_node=5)


def test_ranks_run_in_the_container_that_the_study_names(
    launch: Launch, tmp_path: Path, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Debian has no apptainer: what stands here notes how it was called, and runs the command outside.
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text('#!/bin/bash\necho "$@" > "$3/called-$SLURM_PROCID"\nshift 4\nexec "$@"\n')
    apptainer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apptainer.parent}:{os.environ['PATH']}")
    image = Container(image="torch.sif", runtime="apptainer", python=str(cluster.folder / "interpreter"))
    assert launch("echo in $folder", container=image, world_size=2).codes == (0, 0)
    python = cluster.folder / "interpreter"
    for rank in range(2):
        called = (tmp_path / f"called-{rank}").read_text()
        assert called == f"exec --bind {tmp_path} torch.sif {python} -m scalestudy.trainers.worker {tmp_path}\n"
        assert (tmp_path / f"rank-{rank}.log").read_text() == f"in {tmp_path}\n"


def test_a_lost_node_is_named_and_not_used_again(
    launcher: Callable[..., SlurmLauncher], cluster: SlurmCluster, tmp_path: Path, make_trial: Callable[..., Trial]
) -> None:
    chosen = launcher("echo > $folder/up-$SLURM_PROCID; sleep 61")
    trial = make_trial(world_size=4, devices_per_node=1)

    def cut() -> None:
        if (tmp_path / "up-1").exists() and not killed:
            cluster.kill_node("node2")
            killed.append("node2")

    killed: list[str] = []
    try:
        ended = chosen.run(trial, tmp_path, 120, cut)
        assert ended == Exit(codes=(), timed_out=False, first_failed=None, lost_nodes=("node2",))
        assert chosen.capacity().nodes == 3
    finally:
        cluster.boot_node("node2")
        cluster.all_nodes_up()


# GPUs, for which character devices stand. Ranks that tell what they see and end stand for those that train.


@pytest.fixture
def gpu_study(write_study: WriteStudy, tmp_path: Path) -> Callable[[str], Path]:
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(
        "#!/bin/bash\necho rank ${SLURM_PROCID-} ${SLURMD_NODENAME-} sees $CUDA_VISIBLE_DEVICES\nsleep 1\nexit 7\n"
    )
    interpreter.chmod(0o755)

    def write(device: str) -> Path:
        return write_study(
            trainers="torch-ddp",
            models="cnn",
            world_sizes=[4],
            device=device,
            environments={"torch-ddp": str(interpreter)},
        )

    return write


@pytest.mark.parametrize("device", ["gpu", "auto"])
def test_a_job_of_whole_nodes_has_their_gpus_without_asking_for_them(
    cluster: SlurmCluster, gpu_study: Callable[[str], Path], records: Records, tmp_path: Path, device: str
) -> None:
    out = tmp_path / "out"
    cluster.sbatch("--nodes=2", f"--output={tmp_path}/%j.log", SCALE, gpu_study(device), "--out", out)
    cluster.drained()
    [record] = records(out)
    assert (record.trial.device, record.trial.devices_per_node, record.trial.nodes) == ("gpu", 2, 2), logs(tmp_path)
    # Behind its first line Slurm may say that it ended the step, since the first rank that fails ends all.
    seen = [path.read_text().splitlines()[0] for path in sorted(out.glob("trials/*/rank-*.log"))]
    assert seen == [f"rank {rank} node{1 + rank // 2} sees 0,1" for rank in range(4)]


def test_an_allocation_by_hand_has_the_gpus_of_its_nodes(
    cluster: SlurmCluster, gpu_study: Callable[[str], Path], tmp_path: Path
) -> None:
    # No batch script: Slurm sets no SLURM_GPUS_ON_NODE.
    run = [SCALESTUDY, "run", gpu_study("auto"), "--launcher", "slurm", "--out", tmp_path / "out", "--dry-run"]
    told = cluster.tell("salloc", "--nodes=2", "--exclusive", "--mem=0", "--no-kill", *run)
    assert "world size 4 on 2 nodes" in told


@pytest.mark.parametrize(("device", "script"), [("gpu", SCALE), ("auto", SCALE), ("auto", RAY)])
def test_a_job_without_the_gpus_of_its_nodes_says_how_to_ask_for_them(
    cluster: SlurmCluster, gpu_study: Callable[[str], Path], tmp_path: Path, device: str, script: Path
) -> None:
    options = ["--nodes=2", "--oversubscribe", f"--output={tmp_path}/%j.log", f"--chdir={tmp_path}"]
    job = cluster.sbatch(*options, script, gpu_study(device), "--out", tmp_path / "out")
    cluster.drained()
    assert cluster.exit_code(job) == "2:0"
    who = "ray.sh" if script == RAY else "scalestudy"
    assert logs(tmp_path) == (
        f"{who}: device: {device!r}: job {job} was not given GPUs on every node; "
        "ask for them with sbatch --gpus-per-node=2 --ntasks-per-node=2, a task for each rank's CPUs, or use 'cpu'\n"
    )


def test_a_ray_cluster_in_an_allocation_has_its_gpus(
    cluster: SlurmCluster, gpu_study: Callable[[str], Path], records: Records, tmp_path: Path
) -> None:
    options = ["--nodes=2", f"--output={tmp_path}/%j.log", f"--chdir={tmp_path}"]
    cluster.sbatch(*options, RAY, gpu_study("auto"), "--out", tmp_path / "out")
    cluster.drained()
    [record] = records(tmp_path / "out")
    assert (record.trial.device, record.trial.devices_per_node, record.trial.nodes) == ("gpu", 2, 2), logs(tmp_path)
    seen = [path.read_text() for path in sorted((tmp_path / "out").glob("trials/*/rank-*.log"))]
    assert [line.split("sees ")[1] for line in seen] == ["0,1\n"] * 4


# Whole studies


@pytest.mark.horovod
def test_a_study_of_both_frameworks_over_one_two_and_four_nodes_by_sbatch(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, no_rank_runs: NoRankRuns, tmp_path: Path
) -> None:
    study = write_study(
        trainers=["torch-ddp", "tf-multiworker", "tf-mirrored", "horovod-torch"],
        models=[{"name": "cnn", "data": "digits"}],
        world_sizes=[2, 4, 8],
        devices_per_node=2,
        threads_per_device=1,
    )
    out = tmp_path / "out"
    job = cluster.sbatch("--nodes=4", f"--output={tmp_path}/%j.log", SCALE, study, "--out", out)
    cluster.drained(300)
    assert cluster.exit_code(job) == "0:0", logs(tmp_path)
    found = {(record.trial.trainer, record.trial.world_size): record for record in records(out)}
    assert len(found) == 12
    for (trainer, world_size), record in found.items():
        if trainer == "tf-mirrored" and world_size > 2:
            assert (record.outcome, record.reason) == (
                "skipped",
                f"tf-mirrored drives the devices of one node; {world_size} devices, 2 a node, need {world_size // 2} "
                "nodes",
            )
            continue
        assert record.outcome == "ok", record.reason
        assert record.trial.nodes == world_size // 2
        assert record.environment.launcher == "slurm"
        assert record.environment.scheduler["Slurm job"] == job
        assert record.environment.scheduler["nodes shared with other jobs"] == "no"
        hosts = [report.rank.host for report in record.reports]
        expected = [f"node{1 + rank // 2}" for rank in range(world_size)]
        assert hosts == (["node1"] if trainer == "tf-mirrored" else expected)
        # A node's two ranks had a CPU each.
        for report in record.reports:
            assert report.software is not None
            assert len(report.software.cpus) == report.replicas or os.cpu_count() != 2
        assert len({digest for report in record.reports for digest in report.parameter_checksums}) == 1
    assert "2 devices a node" in (out / "report.html").read_text()
    assert no_rank_runs(out)


def test_a_ray_cluster_in_an_allocation_runs_a_study_and_is_gone_after_it(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(
        trainers="torch-ddp", models="cnn", world_sizes=[2, 4], devices_per_node=2, threads_per_device=1
    )
    options = ["--nodes=2", f"--output={tmp_path}/%j.log", f"--chdir={tmp_path}"]
    job = cluster.sbatch(*options, RAY, study, "--out", tmp_path / "out")
    cluster.drained()
    assert cluster.exit_code(job) == "0:0", logs(tmp_path)
    found = {record.trial.world_size: record for record in records(tmp_path / "out")}
    assert {size: record.outcome for size, record in found.items()} == {2: "ok", 4: "ok"}
    assert found[4].environment.launcher == "ray"
    assert [report.rank.node_rank for report in found[4].reports] == [0, 0, 1, 1]
    assert not list(Path("/tmp").glob(f"ray-{job}-*"))
    running = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in running if f"/tmp/ray-{job}-" in line]


@pytest.mark.parametrize("jobs_at_once", [None, 1])
def test_submit_runs_each_node_count_in_a_job_of_its_own_and_the_report_after_them(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, tmp_path: Path, jobs_at_once: int | None
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[1, 4],
        devices_per_node=2,
        threads_per_device=1,
        repeats=2,
        # Not exclusive: a job has no more devices than it asks for, also that of the smallest trials.
        slurm={"jobs_at_once": jobs_at_once, "exclusive": not jobs_at_once, "setup": "export NCCL_DEBUG=$((40 + 2))"},
    )
    out = tmp_path / "out"
    told = cluster.tell(SCALESTUDY, "submit", study, "--out", out)
    [one, two, report] = re.findall(r"job (\d+) submitted", told)
    assert f"job {two} submitted: trials on 2 nodes" in told
    again = cluster.tell(SCALESTUDY, "submit", study, "--out", out)
    assert again.splitlines() == [
        f"job {one} (trials on 1 node) is still there",
        f"job {two} (trials on 2 nodes) is still there",
    ]
    waiting = cluster.tell(SCALESTUDY, "status", out)
    assert re.search(rf"{report} +report +pending \(Dependency\)", waiting)
    assert "of 2 trials done" in waiting
    cluster.drained()
    found = records(out)
    assert [record.outcome for record in found] == ["ok"] * 4, logs(out / "jobs")
    nodes = {record.environment.scheduler["Slurm job"].partition("_")[0]: record.trial.nodes for record in found}
    assert nodes == {one: 1, two: 2}
    # The set-up lines are the study's shell, and reach the ranks.
    software = [report.software for record in found for report in record.reports]
    assert {each.variables["NCCL_DEBUG"] for each in software if each} == {"42"}
    assert all(software)
    if jobs_at_once:
        tasks = {(record.environment.scheduler["Slurm job"], record.trial.repeat + 1) for record in found}
        assert tasks == {(f"{job}_{repeat}", repeat) for job in (one, two) for repeat in (1, 2)}
    assert (out / "report.html").exists()
    assert "2 of 2 trials done" in cluster.tell(SCALESTUDY, "status", out)
    assert "nothing is missing: all 4 trials" in cluster.tell(SCALESTUDY, "submit", study, "--out", out)
    # Only what is missing, and only in the job that is its.
    gone = next(path for path in (out / "trials").iterdir() if "-w4-r1" in path.name)
    shutil.rmtree(gone)
    told = cluster.tell(SCALESTUDY, "submit", study, "--out", out)
    assert re.findall(r"submitted: (.*)", told) == ["trials on 2 nodes", "the report"]
    cluster.drained()
    assert len(records(out)) == 4


def test_a_job_cancelled_in_mid_trial_leaves_no_rank_and_goes_on_when_submitted_again(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, no_rank_runs: NoRankRuns, tmp_path: Path
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[2],
        devices_per_node=1,
        threads_per_device=1,
        repeats=2,
        measurement={"window_s": 0.5, "windows": 8},
    )
    out = tmp_path / "out"
    [job, report] = re.findall(r"job (\d+) submitted", cluster.tell(SCALESTUDY, "submit", study, "--out", out))
    cluster.until(lambda: len(records(out)) == 1 and len(list(out.glob("trials/*/progress.jsonl"))) == 2)
    cluster.tell("scancel", job)
    cluster.drained()
    assert no_rank_runs(out)
    assert len(records(out)) == 1
    assert (out / "report.html").exists()
    assert "the ranks are gone" in (out / "jobs" / f"{job}.log").read_text()
    assert "ended from outside" in (out / "jobs" / f"{job}.log").read_text()
    cluster.tell(SCALESTUDY, "submit", study, "--out", out)
    cluster.drained()
    assert [record.outcome for record in records(out)] == ["ok", "ok"]
    assert len(list(out.glob("trials/*.unfinished-1"))) == 1


def test_a_job_at_its_time_limit_requeues_itself_and_goes_on(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[2],
        devices_per_node=1,
        threads_per_device=1,
        repeats=8,
        measurement={"window_s": 0.5, "windows": 6},
    )
    out = tmp_path / "out"
    # A minute is Slurm's smallest limit, and its signal may come half a minute early.
    options = ["--time=1", "--signal=B:USR1@5", "--nodes=2", f"--output={tmp_path}/%j.log"]
    job = cluster.sbatch(*options, SCALE, study, "--out", out)
    cluster.drained(300)
    said = (tmp_path / f"{job}.log").read_text()
    assert f"job {job} is requeued and goes on by itself" in said
    assert [record.outcome for record in records(out)] == ["ok"] * 8
    assert {record.environment.scheduler["Slurm job"] for record in records(out)} == {job}
    assert re.search(r"8 trials, [1-9]\d* done before", said)


def test_a_job_too_short_for_one_trial_is_not_requeued_for_ever(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[1],
        devices_per_node=1,
        measurement={"window_s": 0.5, "windows": 100},
    )
    out = tmp_path / "out"
    job = cluster.sbatch("--nodes=1", f"--output={tmp_path}/%j.log", SCALE, study, "--out", out)
    cluster.until(lambda: list(out.glob("trials/*/progress.jsonl")))
    cluster.tell("scancel", "--batch", "--signal=USR1", job)
    cluster.drained()
    assert cluster.exit_code(job) == "130:0"
    assert "finished no trial and would go round for ever: give it more --time" in logs(tmp_path)
    assert records(out) == []


def test_a_preempted_job_goes_on_when_the_nodes_are_free_again(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[1],
        devices_per_node=1,
        repeats=3,
        measurement={"window_s": 0.5, "windows": 6},
    )
    out = tmp_path / "out"
    job = cluster.sbatch("--nodes=4", f"--output={tmp_path}/%j.log", SCALE, study, "--out", out)
    cluster.until(lambda: len(records(out)) == 1 and len(list(out.glob("trials/*/progress.jsonl"))) == 2)
    urgent = cluster.sbatch("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 2", "--output=/dev/null")
    cluster.until(lambda: cluster.state(urgent) == "COMPLETED")
    cluster.drained()
    assert cluster.state(job) == "COMPLETED"
    assert [record.outcome for record in records(out)] == ["ok"] * 3
    assert len(list(out.glob("trials/*.unfinished-1"))) == 1


def test_a_node_that_dies_costs_one_trial_and_is_waited_for(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, no_rank_runs: NoRankRuns, tmp_path: Path
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[2, 4],
        devices_per_node=1,
        threads_per_device=1,
        measurement={"window_s": 0.5, "windows": 10},
        # The four-node trial comes first.
        seed=2,
    )
    out = tmp_path / "out"
    job = cluster.sbatch("--nodes=4", f"--output={tmp_path}/%j.log", SCALE, study, "--out", out)
    cluster.until(lambda: list(out.glob("trials/*-w4-*/progress.jsonl")))
    cluster.kill_node("node4")
    try:
        # The study goes on with what is left, and then asks for four nodes again.
        cluster.until(lambda: cluster.state(job) == "PENDING", 120)
        by_size = {record.trial.world_size: record for record in records(out)}
        assert by_size[2].outcome == "ok", by_size[2].reason
        assert (by_size[4].outcome, by_size[4].retry) == ("failed", True)
        assert by_size[4].reason == "node node4 failed under the trial"
        assert no_rank_runs(out)
    finally:
        cluster.boot_node("node4")
        cluster.all_nodes_up()
    cluster.drained()
    assert {record.trial.world_size: record.outcome for record in records(out)} == {2: "ok", 4: "ok"}
    [kept] = out.glob("trials/*-w4-*.unfinished-1/record.json")
    assert "node node4 failed" in kept.read_text()
    assert "1 of the trials wait for more nodes than are left; job" in logs(tmp_path)


def test_no_string_of_a_study_is_read_by_a_shell(
    cluster: SlurmCluster, write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    nasty = tmp_path / "a b;$(touch PWNED)`touch PWNED`'\"%j&|<>*"
    images = nasty / "data" / "cats"
    images.mkdir(parents=True)
    shutil.copytree(images, nasty / "data" / "dogs")
    from PIL import Image

    for index in range(4):
        for name in ("cats", "dogs"):
            Image.new("RGB", (32, 32)).save(nasty / "data" / name / f"{index}.png")
    python = nasty / "python"
    # Not a link: it would lie outside the virtual environment, and not be of it.
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    study = write_study(
        folder=nasty,
        trainers="torch-ddp",
        models=[{"name": "cnn", "data": "images:data", "image_size": 32}],
        batch=2,
        world_sizes=[2],
        devices_per_node=1,
        threads_per_device=1,
        environments={"torch-ddp": str(python)},
    )
    out = nasty / "out"
    cluster.tell(SCALESTUDY, "submit", study, "--out", out)
    cluster.drained()
    assert [record.outcome for record in records(out)] == ["ok"], logs(out / "jobs")
    assert (out / "report.html").exists()
    assert not list(ROOT.glob("PWNED"))
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("field", ["partition", "constraint", "reservation", "gres", "time"])
def test_what_slurm_refuses_is_told_in_slurms_words_and_leaves_no_job(
    cluster: SlurmCluster, write_study: WriteStudy, tmp_path: Path, field: str
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[1, 2],
        devices_per_node=1,
        slurm={field: "no such; $(touch PWNED)"},
    )
    told = cluster.tell(SCALESTUDY, "submit", study, "--out", tmp_path / "out", expected=2)
    assert len(told.splitlines()) == 1
    assert re.search(r"Slurm says: .*(not found|[Ii]nvalid|not available)", told), told
    assert not cluster.tell("squeue", "--noheader")
    assert not list(ROOT.glob("PWNED"))
    assert not list(tmp_path.rglob("PWNED"))


def test_an_edited_study_waits_for_the_jobs_of_the_old_one(
    cluster: SlurmCluster, write_study: WriteStudy, tmp_path: Path
) -> None:
    fields = {"trainers": "torch-ddp", "models": "cnn", "world_sizes": [4], "devices_per_node": 1}
    cluster.tell(SCALESTUDY, "submit", write_study(**fields), "--out", tmp_path / "out")
    told = cluster.tell(SCALESTUDY, "submit", write_study(**fields, seed=2), "--out", tmp_path / "out", expected=2)
    assert re.search(r"another version of this study are there; wait for them, or end them: scancel \d+$", told.strip())
