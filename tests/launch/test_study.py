import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalestudy.cluster.host import Topology
from scalestudy.launch.errors import InputError
from scalestudy.launch.launcher import check_capacity
from scalestudy.launch.study import load_study, resolve, study_trials
from scalestudy.trainers.options import MultiWorkerOptions
from scalestudy.trainers.trainer import TRAINERS, series_name
from scalestudy.trainers.trial import Measurement, Trial

TWO_CPUS = Topology(nodes=1, cpus_per_node=2)
# Four cores of two hardware threads.
HYPER = Topology(nodes=1, cpus_per_node=8, cores_per_node=4)
STUDY: dict[str, Any] = {
    "schema": 1,
    "name": "t",
    "trainers": ["torch-ddp", "tf-multiworker"],
    "models": [{"name": "cnn", "data": "digits"}],
    "world_sizes": [1, 2],
    "batch": 8,
    "repeats": 2,
    "device": "cpu",
}
Write = Callable[..., Path]
MakeTrial = Callable[..., Trial]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **changes}))
        return path

    return write


def trials(path: Path, topology: Topology = TWO_CPUS) -> list[Trial]:
    study = load_study(path)
    found = study_trials(study, path, resolve(study, path, topology))
    check_capacity(found, path, study.launcher, topology)
    return found


def test_a_study_is_every_combination_and_every_repeat(write: Write) -> None:
    found = trials(write(models=[{"name": "cnn", "data": "digits"}, "resnet18"], batch=[4, 8]))
    assert len(found) == len({trial.id for trial in found}) == 2 * 2 * 2 * 2 * 2
    assert {(t.model, t.data.image_size, t.data.classes) for t in found} == {("cnn", 32, 10), ("resnet18", 224, 1000)}


def test_weak_scaling_holds_the_per_device_batch_and_strong_the_global_one(write: Write) -> None:
    assert {(t.world_size, t.global_batch) for t in trials(write(scaling="weak"))} == {(1, 8), (2, 16)}
    assert {(t.world_size, t.global_batch) for t in trials(write(scaling="strong"))} == {(1, 8), (2, 8)}


def test_threads_are_shared_out_so_that_every_world_size_has_the_same(write: Write) -> None:
    four = Topology(nodes=1, cpus_per_node=4)
    assert {trial.threads_per_device for trial in trials(write(), four)} == {2}


@pytest.mark.parametrize(
    ("changes", "devices", "threads", "hyper_threads"),
    [
        # A device is a core, and a thread has one to itself.
        ({}, 4, 2, False),
        ({"world_sizes": [1, 4]}, 4, 1, False),
        ({"devices_per_node": 2}, 2, 2, False),
        # Only what the study asks for takes both threads of a core.
        ({"devices_per_node": 8, "world_sizes": [1, 8]}, 8, 1, True),
        ({"threads_per_device": 4}, 4, 4, True),
        ({"threads_per_device": 2}, 4, 2, False),
        ({"hyper_threads": True}, 4, 4, True),
        ({"hyper_threads": True, "threads_per_device": 2}, 4, 2, True),
    ],
)
def test_a_study_on_cpu_counts_cores(
    write: Write, changes: dict[str, Any], devices: int, threads: int, hyper_threads: bool
) -> None:
    found = {(t.devices_per_node, t.threads_per_device, t.hyper_threads) for t in trials(write(**changes), HYPER)}
    assert found == {(devices, threads, hyper_threads)}


def test_a_gpu_has_the_cores_of_its_share_of_the_node_however_few_gpus_a_study_uses(write: Write) -> None:
    node = Topology(nodes=1, cpus_per_node=224, cores_per_node=112, gpus_per_node=8)
    for sizes in ([1, 2], [1, 8]):
        found = trials(write(device="gpu", world_sizes=sizes), node)
        assert {(t.threads_per_device, t.hyper_threads) for t in found} == {(14, False)}
    [threads] = {t.threads_per_device for t in trials(write(device="gpu", hyper_threads=True), node)}
    assert threads == 28


def test_a_trial_on_whole_cores_is_named_as_before_there_were_others(make_trial: MakeTrial) -> None:
    later: Any = {"sweep": True, "hyper_threads": True, "rotate_devices": True, "measurement": {"warm_up_min_s"}}
    before = make_trial().model_dump_json(by_alias=True, exclude=later)
    assert make_trial().id == hashlib.sha256(before.encode()).hexdigest()[:12]
    assert make_trial(hyper_threads=True).id != make_trial().id
    assert make_trial(rotate_devices=False).id != make_trial().id
    assert make_trial(measurement=Measurement(warm_up_min_s=1)).id != make_trial(measurement=Measurement()).id


def test_devices_are_rotated_unless_a_study_says_otherwise(write: Write) -> None:
    assert {trial.rotate_devices for trial in trials(write())} == {True}
    assert {trial.rotate_devices for trial in trials(write(rotate_devices=False))} == {False}


def test_devices_of_a_node_that_are_used_decide_how_many_nodes_a_trial_takes(write: Write) -> None:
    four = Topology(nodes=4, cpus_per_node=8)
    found = trials(write(world_sizes=[1, 3, 4], devices_per_node=[1, 2]), four)
    assert {(t.world_size, t.devices_per_node, t.nodes) for t in found} == {
        (1, 1, 1),
        (3, 1, 3),
        (4, 1, 4),
        (1, 2, 1),
        (3, 2, 2),
        (4, 2, 2),
    }
    # Two devices of a node share its eight CPUs.
    assert {t.threads_per_device for t in found} == {4}


def test_auto_takes_gpus_where_nodes_have_them(write: Write) -> None:
    path = write(device="auto")
    study = load_study(path)
    assert resolve(study, path, TWO_CPUS).device == "cpu"
    with_gpus = resolve(study, path, Topology(nodes=1, cpus_per_node=8, gpus_per_node=2))
    assert (with_gpus.device, with_gpus.devices_per_node, with_gpus.threads_per_device) == ("gpu", (2,), 4)


def test_loader_workers_are_what_the_cpus_of_a_rank_can_carry_unless_the_study_says(write: Write) -> None:
    gpus = Topology(nodes=1, cpus_per_node=32, gpus_per_node=2)
    found = {trial.loader_workers for trial in trials(write(device="gpu"), gpus)}
    # Sixteen CPUs a rank: one feeds the GPU.
    assert found == {15}
    assert {trial.loader_workers for trial in trials(write(device="gpu", loader_workers=0), gpus)} == {0}
    # On CPU they would take theirs from the training.
    assert {trial.loader_workers for trial in trials(write(), Topology(nodes=1, cpus_per_node=32))} == {1}


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_gpus_that_cannot_be_used_are_not_silently_done_without(write: Write, device: str) -> None:
    path = write(device=device)
    broken = Topology(nodes=1, cpus_per_node=8, gpu_fault="NVIDIA's driver does not work here: why; reboot")
    with pytest.raises(InputError) as caught:
        resolve(load_study(path), path, broken)
    assert (
        str(caught.value)
        == f"{path}: device: '{device}': NVIDIA's driver does not work here: why; reboot; or use 'cpu'"
    )
    on_cpu = write(device="cpu")
    assert resolve(load_study(on_cpu), on_cpu, broken).device == "cpu"


def test_more_gpus_than_can_be_used_are_refused_with_the_reason(write: Write) -> None:
    one = Topology(nodes=1, cpus_per_node=8, gpus_per_node=1, gpu_limit="why")
    path = write(device="gpu", world_sizes=[2], devices_per_node=2)
    with pytest.raises(InputError, match=r"a node has 1 gpu devices \(why\); use at most 1"):
        resolve(load_study(path), path, one)
    path = write(device="gpu", world_sizes=[2])
    study = load_study(path)
    with pytest.raises(InputError, match=r"with 1 gpu devices \(why\); use at most 1"):
        check_capacity(study_trials(study, path, resolve(study, path, one)), path, "local", one)


def test_the_order_is_shuffled_by_the_seed_repeat_by_repeat(write: Write) -> None:
    first, again, other = trials(write()), trials(write()), trials(write(seed=2))
    assert first == again
    assert [t.repeat for t in first] == [0] * 4 + [1] * 4
    assert [(t.trainer, t.world_size) for t in first] != [(t.trainer, t.world_size) for t in other]
    assert [(t.trainer, t.world_size) for t in first[:4]] != [(t.trainer, t.world_size) for t in first[4:]]


def test_the_same_trial_has_the_same_id_in_another_study(write: Write) -> None:
    more = trials(write(name="other", trainers="torch-ddp", repeats=3))
    assert {t.id for t in trials(write()) if t.trainer == "torch-ddp"} < {t.id for t in more}


def test_executions_are_the_users_own_unless_given_for_all_or_by_trainer(write: Write) -> None:
    def found(**changes: Any) -> set[tuple[str, str]]:
        return {(trial.trainer, trial.execution) for trial in trials(write(**changes))}

    assert found() == {("torch-ddp", "eager"), ("tf-multiworker", "graph")}
    assert found(execution="compiled") == {("torch-ddp", "compiled"), ("tf-multiworker", "compiled")}
    assert found(execution={"torch-ddp": ["eager", "compiled"]}) == {
        ("torch-ddp", "eager"),
        ("torch-ddp", "compiled"),
        ("tf-multiworker", "graph"),
    }


def test_options_and_precisions_are_swept_in_every_combination(write: Write) -> None:
    swept = {"bucket_cap_mb": [1, None], "communication_hook": ["none", "fp16"], "static_graph": True}
    found = trials(write(world_sizes=[2], repeats=1, precision=["fp32", "bf16"], options={"torch-ddp": swept}))
    assert len({trial.id for trial in found}) == len(found) == 2 * 4 + 2
    names = {series_name(trial) for trial in found}
    assert names == {
        "tf-multiworker",
        "torch-ddp static_graph=True",
        "torch-ddp bucket_cap_mb=1 static_graph=True",
        "torch-ddp static_graph=True communication_hook=fp16",
        "torch-ddp bucket_cap_mb=1 static_graph=True communication_hook=fp16",
    }
    # The defaults are on record too.
    assert {trial.options for trial in found if trial.trainer == "tf-multiworker"} == {MultiWorkerOptions()}


def test_a_trial_reads_back_with_its_own_kind_of_options(write: Write) -> None:
    every = list(TRAINERS)
    for trial in trials(write(trainers=every, options={"horovod-tf": {"autotune": True}})):
        assert Trial.model_validate_json(trial.model_dump_json(by_alias=True)) == trial
        assert type(trial.options) is TRAINERS[trial.trainer].options


def test_anything_measured_differently_has_another_id(write: Write) -> None:
    ids = {trial.id for trial in trials(write())}
    assert not ids & {trial.id for trial in trials(write(measurement={"window_s": 0.1}))}
    assert not ids & {trial.id for trial in trials(write(optimizer={"name": "adam"}))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainers": ["torch-dpp"]},
            "trainers.0: no trainer 'torch-dpp'; did you mean 'torch-ddp'? known: torch-ddp, ",
        ),
        ({"models": ["resnet19"]}, "models.0.name: no model 'resnet19'; did you mean 'resnet18'?"),
        ({"modles": ["cnn"]}, "modles: no field 'modles'; did you mean 'models'?"),
        ({"models": [{"name": "cnn", "bach": 8}]}, "models.0.bach: no field 'bach'; did you mean 'batch'?"),
        ({"measurement": {"window": 1}}, "measurement.window: no field 'window'; did you mean 'windows'?"),
        ({"world_sizes": [0]}, "world_sizes.0: 0: input should be greater than or equal to 1"),
        ({"world_sizes": [1, 1]}, "world_sizes: 1 stands there twice"),
        ({"world_sizes": []}, "world_sizes: is empty; name at least one"),
        ({"repeats": "three"}, "repeats: 'three': input should be a valid integer"),
        ({"repeats": True}, "repeats: True: input should be a valid integer"),
        ({"scaling": "strnog"}, "scaling: 'strnog': input should be 'weak' or 'strong'"),
        ({"schema": 2}, "schema: 2: input should be 1"),
        ({"name": "x; rm -rf ~"}, "name: 'x; rm -rf ~': string should match pattern"),
        ({"batch": None}, "models.0 (cnn): no batch; give it here or for the whole study"),
        ({"scaling": "strong", "batch": 7}, "batch 7 does not divide by world size 2"),
        ({"precision": ["fp32", "fp8"]}, "precision.1: 'fp8': input should be 'fp32', 'tf32', 'bf16' or 'fp16'"),
        (
            {"execution": {"torch-ddp": "fast"}},
            "execution.torch-ddp.0: 'fast': input should be 'eager', 'graph' or 'compiled'",
        ),
        ({"execution": {"torch-dpp": "eager"}}, "execution.torch-dpp.[key]: no trainer 'torch-dpp'; did you mean"),
        ({"execution": {"horovod-tf": "eager"}}, "execution.horovod-tf: the study has no such trainer; add it"),
        ({"options": {"horovod-tf": {"autotune": True}}}, "options.horovod-tf: the study has no such trainer"),
        (
            {"options": {"torch-ddp": {"bucket_cap": 1}}},
            "options: torch-ddp.bucket_cap: no field 'bucket_cap'; did you mean 'bucket_cap_mb'?",
        ),
        (
            {"options": {"torch-ddp": {"bucket_cap_mb": [1, -1]}}},
            "options: torch-ddp.bucket_cap_mb: -1: input should be greater than 0",
        ),
        ({"options": {"torch-ddp": {"bucket_cap_mb": [1, 1]}}}, "options: 1 stands there twice"),
        (
            {"environments": {"torch-ddp": {"image": "x.sif"}}},
            "environments.torch-ddp.container.runtime: is missing",
        ),
        ({"slurm": {"partiton": "gpu"}}, "slurm.partiton: no field 'partiton'; did you mean 'partition'?"),
        (
            {"slurm": {"container": {"image": "x", "runtime": "pyxis", "mount": "/d"}}},
            "slurm.container.mount: no field 'mount'; did you mean 'mounts'?",
        ),
        ({"slurm": {"time": 7200}}, "slurm.time: 7200: YAML reads 02:00:00 as a number of seconds; put it in quotes"),
        ({"slurm": {"account": "a\nb"}}, "slurm.account: 'a\\nb': string should match pattern"),
        ({"devices_per_node": [2, 2]}, "devices_per_node: 2 stands there twice"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate: -1: input should be greater than 0"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(write: Write, changes: dict[str, Any], message: str) -> None:
    path = write(**changes)
    with pytest.raises(InputError) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_sizes": [3]}, "world_sizes: 3 is above the capacity of launcher 'local': 1 node with 2 cpu devices"),
        (
            {"threads_per_device": 2},
            "threads_per_device: 2 threads × 2 devices need 4 CPUs, there are 2; use",
        ),
        (
            {"devices_per_node": 4, "world_sizes": [4]},
            "devices_per_node: 4, but a node has 2 cpu devices; use at most 2",
        ),
        ({"device": "gpu"}, "device: 'gpu', but no NVIDIA GPU is found here; use 'cpu' or 'auto'"),
        (
            {"data": "images:nowhere", "models": ["cnn"]},
            "data: {folder}/nowhere: no folder with one",
        ),
        ({"data": "mnist:nowhere", "models": ["cnn"]}, "data: {folder}/nowhere: no file train-images-idx3-ubyte"),
        (
            {"models": [{"name": "cnn", "data": "digit"}]},
            "models.cnn.data: no data source 'digit'; did you mean",
        ),
        (
            {"data": "images", "models": ["cnn"]},
            "data: 'images' is none of synthetic, synthetic-host, digits",
        ),
        ({"models": [{"name": "cnn", "image_size": 8}]}, "models.cnn.image_size: 8: the image is too small"),
        ({"models": [{"name": "cnn", "data": "digits", "channels": 3}]}, "models.cnn.channels: 3, but digits has 1"),
        (
            {"trainers": "torch-ddp", "execution": "graph"},
            "execution: 'graph': torch has CUDA graphs alone, and the device is a cpu; use 'compiled'",
        ),
        (
            {"trainers": "horovod-torch", "execution": "graph"},
            "execution: 'graph': horovod-torch: Horovod's exchange is started by a thread of the host",
        ),
        ({"precision": ["fp32", "tf32"]}, "precision: 'tf32': a format of NVIDIA GPUs, and the device is a cpu; use"),
        (
            {"options": {"torch-ddp": {"communication_hook": "bf16"}}},
            "options.torch-ddp.communication_hook: 'bf16': the device is a cpu, and torch has it for NCCL alone",
        ),
        (
            {"options": {"torch-ddp": {"communication_hook": "powersgd"}}},
            "options.torch-ddp.communication_hook: 'powersgd': the device is a cpu, and gloo's ranks wait",
        ),
        (
            {"options": {"tf-multiworker": {"implementation": "nccl"}}},
            "options.tf-multiworker.implementation: 'nccl': the device is a cpu, and NCCL connects GPUs; use 'auto'",
        ),
        (
            {"trainers": "horovod-tf", "options": {"horovod-tf": {"hierarchical_allreduce": [False, True]}}},
            "options.horovod-tf.hierarchical_allreduce: True: the device is a cpu, and Horovod has it for NCCL",
        ),
    ],
)
def test_what_the_machine_or_the_data_refuse_is_one_line_too(
    write: Write, changes: dict[str, Any], message: str
) -> None:
    path = write(**changes)
    with pytest.raises(InputError) as caught:
        trials(path)
    assert str(caught.value).startswith(f"{path}: {message.format(folder=path.parent)}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"world_sizes": [8]},
            "world_sizes: 8 is above the capacity of launcher 'local': 1 node with 4 cpu devices; use at most 4, or "
            "devices_per_node: 8 to put a rank on every hardware thread",
        ),
        (
            {"devices_per_node": 16, "world_sizes": [16]},
            "devices_per_node: 16, but a node has 4 cpu devices (8 hardware threads); use at most 8",
        ),
        (
            {"threads_per_device": 5},
            "threads_per_device: 5 threads × 2 devices need 10 CPUs, there are 8 on 4 cores; use at most 4",
        ),
        (
            {"threads_per_device": 4, "hyper_threads": False},
            "hyper_threads: false, but 4 threads × 2 devices need 8 cores, there are 4 (8 hardware threads); use true, "
            "or at most 2 threads_per_device",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_cores_and_in_hardware_threads(
    write: Write, changes: dict[str, Any], message: str
) -> None:
    path = write(**changes)
    with pytest.raises(InputError) as caught:
        trials(path, HYPER)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [("name: [", "not YAML"), ("- a\n- b", "a study is a mapping"), ("", "a study is a mapping")],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"broken.yaml: {message}"):
        load_study(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.yaml: cannot be read: No such file"):
        load_study(tmp_path / "none.yaml")


def test_every_mistake_is_told_at_once(write: Write) -> None:
    with pytest.raises(InputError) as caught:
        load_study(write(repeats=0, scaling="x"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "studies").glob("*.yaml")), ids=lambda p: p.name)
@pytest.mark.parametrize(
    "topology",
    [Topology(nodes=1, cpus_per_node=16), Topology(nodes=2, cpus_per_node=64, gpus_per_node=8)],
    ids=["cpu", "gpu"],
)
def test_the_ready_studies_are_valid(path: Path, topology: Topology) -> None:
    assert load_study(path).name == path.stem
    if path.stem != "gpu" or topology.gpus_per_node:
        assert trials(path, topology)


@pytest.mark.parametrize(
    ("changes", "product"),
    [
        ({"repeats": 10**9}, "2 trainers × 1 model × 2 world sizes × 1,000,000,000 repeats = 4,000,000,000 trials"),
        ({"repeats": {"max": 10**6, "until": "1%"}}, "2 trainers × 1 model × 2 world sizes × 1,000,000 repeats"),
        ({"batch": [*range(1, 6000)]}, "2 trainers × 5,999 batches of 1 model × 2 world sizes × 2 repeats = 47,992"),
        (
            {
                "options": {"torch-ddp": {"bucket_cap_mb": [*range(1, 91)], "powersgd_rank": [*range(1, 91)]}},
                "precision": ["fp32", "bf16"],
            },
            "8,101 ways to run 2 trainers × 1 model × 2 precisions × 2 world sizes × 2 repeats = 64,808 trials",
        ),
    ],
)
def test_a_study_of_too_many_trials_is_refused_with_the_product(
    write: Write, changes: dict[str, Any], product: str
) -> None:
    with pytest.raises(InputError, match="more than 20,000; ask for fewer, or raise max_trials") as caught:
        load_study(write(**changes))
    assert f"max_trials: {product}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_explode_are_refused_before_they_are_combined(write: Write) -> None:
    options = {name: [*range(1, 2000)] for name in ("bucket_cap_mb", "powersgd_rank", "static_graph")}
    with pytest.raises(InputError, match=r"1,999 'bucket_cap_mb' × .* = 7,988,005,999 combinations, more than max_tri"):
        load_study(write(options={"torch-ddp": options}))


def test_max_trials_says_how_many_trials_are_meant(write: Write) -> None:
    assert len(trials(write(repeats=5001, max_trials=20_004))) == 20_004
    with pytest.raises(InputError, match="= 8 trials, more than 7;"):
        load_study(write(max_trials=7))


def test_every_trial_of_a_study_is_counted_without_making_one(write: Write) -> None:
    path = write(
        models=[{"name": "cnn", "data": "digits", "batch": [4, 8]}, "resnet18"],
        execution={"torch-ddp": ["eager", "compiled"]},
        options={"torch-ddp": {"bucket_cap_mb": [None, 1, 2]}},
        precision=["fp32", "bf16"],
        devices_per_node=[1, 2],
        world_sizes=[1],
    )
    assert load_study(path).trial_count == len(trials(path)) == 3 * 2 * 7 * 2 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": True}, "seed: true is no number"),
        ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate: true is no number"),
        ({"measurement": {"windows": False}}, "measurement.windows: false is no number"),
        ({"measurement": {"window_s": "1e999"}}, "measurement.window_s: '1e999': input should be a finite number"),
        ({"costs": {"price_per_device_hour": "nan"}}, "costs.price_per_device_hour: 'nan': input should be a finite"),
        ({"options": {"torch-ddp": {"bucket_cap_mb": "inf"}}}, "torch-ddp.bucket_cap_mb: 'inf': input should be a fin"),
        ({"seed": 2**32}, "seed: 4294967296: input should be less than or equal to 4294967295"),
        ({"world_sizes": [2**31]}, "world_sizes.0: 2147483648: input should be less than or equal to 2147483647"),
        ({"measurement": {"windows": "9" * 300}}, "input should be less than or equal to 1000000"),
        ({"models": [{"name": "cnn", "data": "images:~no-such-user/x"}]}, "data: Could not determine home directory"),
        ({"data": "images:a\nb"}, "data: 'images:a\\nb': string should match pattern"),
        ({"environments": {"torch-ddp": {"image": "x", "runtime": "apptainer", "a\nb": 1}}}, "no field 'a\\nb'"),
        ({"trainers": ["x" * 5000]}, "…"),
    ],
)
def test_a_value_that_no_machine_takes_is_one_line(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        trials(write(**changes))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_of_many_mistakes_the_first_are_told(write: Write) -> None:
    with pytest.raises(InputError) as caught:
        load_study(write(trainers=[f"trainer-{number}" for number in range(1000)]))
    lines = str(caught.value).split("\n")
    assert len(lines) == 21
    assert lines[-1].endswith("and 980 mistakes more")


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 8, "models": [{"name": "cnn", "data": "digits"}, {"name": "cnn", "data": "digits", "batch": 8}]},
        {"data": "digits", "models": ["cnn", {"name": "cnn", "data": "digits"}]},
        {"options": {"torch-ddp": {"bucket_cap_mb": [25, 25.0]}}},
    ],
)
def test_the_same_trial_by_two_names_is_refused(write: Write, changes: dict[str, Any]) -> None:
    """One would set aside what the other has measured."""
    with pytest.raises(InputError, match="twice"):
        trials(write(**changes))
