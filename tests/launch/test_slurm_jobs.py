"""The jobs of a study, as golden text: what sbatch is told, and the script that it runs."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalestudy.cluster.host import Topology
from scalestudy.launch.slurm_jobs import Share, report_job, settled, settled_trials, trials_job
from scalestudy.launch.study import Study, load_study, resolve, study_trials
from scalestudy.trainers.trial import Trial

OUT = Path("/out/a b")


def study(**changes: Any) -> Study:
    fields = {"name": "s", "trainers": "torch-ddp", "models": "cnn", "batch": 8, "world_sizes": [1, 16], "repeats": 3}
    return Study.model_validate({**fields, **changes})


def share(make_trial: Callable[..., Trial], device: str = "gpu", repeats: int = 3) -> Share:
    fields = {"world_size": 16, "devices_per_node": 8, "device": device, "threads_per_device": 7}
    return Share(2, tuple(make_trial(**fields, repeat=repeat) for repeat in range(repeats)))


def test_a_job_asks_for_whole_nodes_and_is_told_before_its_time_is_over(make_trial: Callable[..., Trial]) -> None:
    argv, script = trials_job(study(), OUT, "study-1.yaml", share(make_trial), 8)
    assert shlex.join(argv) == (
        "sbatch --parsable --job-name=scalestudy-s-n2 '--output=/out/a b/jobs/%j.log' --open-mode=append --nodes=2 "
        "--ntasks-per-node=8 --cpus-per-task=7 --signal=B:USR1@120 --requeue --no-kill --gpus-per-node=8 --exclusive "
        "--mem=0"
    )
    assert script == (
        "#!/bin/bash\nset -e\n"
        f"exec {sys.executable} -m scalestudy.launch run '/out/a b/jobs/study-1.yaml' --launcher slurm "
        "--out '/out/a b' --nodes 2\n"
    )


@pytest.mark.parametrize(
    ("options", "there", "not_there"),
    [
        ({"partition": "gpu; rm -rf ~"}, "'--partition=gpu; rm -rf ~'", "--array"),
        ({"account": "a", "qos": "q", "constraint": "x&y", "reservation": "r"}, "--account=a --qos=q", "--partition"),
        ({"constraint": "x&y"}, "'--constraint=x&y'", "--qos"),
        ({"time": "02:00:00"}, "--time=02:00:00", "--qos"),
        ({"gres": "gpu:a100:8"}, "--gres=gpu:a100:8", "--gpus-per-node"),
        ({"exclusive": False}, "--gpus-per-node=8", "--exclusive"),
        ({"exclusive": False}, "--gpus-per-node=8", "--mem"),
    ],
)
def test_an_option_of_the_study_is_one_argument_of_sbatch(
    make_trial: Callable[..., Trial], options: dict[str, Any], there: str, not_there: str
) -> None:
    told = shlex.join(trials_job(study(slurm=options), OUT, "s.yaml", share(make_trial), 8)[0])
    assert there in told
    assert not_there not in told


def test_a_cpu_study_asks_for_no_gpu(make_trial: Callable[..., Trial]) -> None:
    assert "gpu" not in shlex.join(trials_job(study(), OUT, "s.yaml", share(make_trial, device="cpu"), 8)[0])


def test_with_jobs_at_once_every_repeat_is_a_task_of_an_array(make_trial: Callable[..., Trial]) -> None:
    some = share(make_trial, repeats=3)._replace(trials=share(make_trial).trials[1:])
    argv, script = trials_job(study(slurm={"jobs_at_once": 2}), OUT, "s.yaml", some, 8)
    assert "--array=2,3%2" in argv
    assert "--output=/out/a b/jobs/%A_%a.log" in argv
    assert script.endswith('--nodes 2 --repeat "$SLURM_ARRAY_TASK_ID"\n')


def test_set_up_runs_before_the_controller(make_trial: Callable[..., Trial]) -> None:
    chosen = study(slurm={"setup": ["module load cuda/12", "ulimit -l unlimited"]})
    script = trials_job(chosen, OUT, "s.yaml", share(make_trial), 8)[1]
    assert script.startswith("#!/bin/bash\nset -e\nmodule load cuda/12\nulimit -l unlimited\nexec ")


def test_the_report_waits_for_all_jobs_however_they_end() -> None:
    argv, script = report_job(study(), OUT, ["1", "2"])
    assert "--dependency=afterany:1:2" in argv
    assert "--nodes=1" in argv
    assert script.endswith(f"exec {sys.executable} -m scalestudy.launch report '/out/a b'\n")


@pytest.mark.parametrize(
    "topology",
    [
        Topology(nodes=4, cpus_per_node=64, gpus_per_node=8),
        # Sixteen ranks on eight cores: each takes a hardware thread.
        Topology(nodes=1, cpus_per_node=16, cores_per_node=8, gpus_per_node=16),
    ],
    ids=["cores", "hyper-threads"],
)
def test_a_settled_study_has_the_same_trials_whatever_machine_reads_it(tmp_path: Path, topology: Topology) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").touch()
    path = tmp_path / "s.yaml"
    fields = {
        "schema": 1,
        "name": "s",
        "trainers": ["torch-ddp"],
        "models": ["cnn", {"name": "resnet18", "data": "images:data", "batch": [2, 4]}],
        "batch": 8,
        "world_sizes": [1, 16],
        "repeats": 2,
        "environments": {"torch-ddp": "python3"},
    }
    path.write_text(yaml.safe_dump(fields))
    read = load_study(path)
    layout = resolve(read, path, topology)
    copy = tmp_path / "elsewhere" / "study.yaml"
    copy.parent.mkdir()
    copy.write_text(settled(read, path, layout))
    assert settled_trials(copy) == study_trials(read, path, layout)
    assert str(load_study(copy).environments["torch-ddp"]).startswith("/")
