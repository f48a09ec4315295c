"""The study file: what to vary and what to hold fixed, validated whole before anything starts."""

import difflib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from scalestudy.cluster.frozen import Frozen, Given
from scalestudy.cluster.host import Topology
from scalestudy.launch.errors import InputError
from scalestudy.launch.yaml_file import read_yaml
from scalestudy.trainers.data import class_names, mnist_files
from scalestudy.trainers.models import MODELS, model_spec
from scalestudy.trainers.options import Options
from scalestudy.trainers.record import Costs
from scalestudy.trainers.trainer import TRAINERS, refusal, series_name
from scalestudy.trainers.trial import Data, Device, Execution, Measurement, Optimizer, Precision, Scaling, Trial

# Of what a user wrote a message quotes so much.
_SHOWN = 80
_MOST_MISTAKES = 20
# A study of more is taken for a mistake, unless its `max_trials` says otherwise.
_MOST_TRIALS = 20_000
# The range of so many holds the true median 97 % of the time, that of five 94 %: with fewer no interval reaches 95 %.
_FEWEST_REPEATS = 6
SOURCES = ("synthetic", "synthetic-host", "digits", "images:DIR", "mnist:DIR")


def shown(value: Any) -> str:
    """Return what a user wrote as it may stand in a message: on one line, and not without end."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def known(kind: str, name: str, names: Iterable[str]) -> str:
    """Return `name` if it is one of `names`; raises ValueError with the nearest one."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1) if len(name) <= _SHOWN else []
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    raise ValueError(f"no {kind} {shown(name)}{guess} known: {', '.join(names)}")


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        counts = Counter(values)
    except TypeError:
        # Of options, where any value may stand before it is looked at: a list cannot be counted.
        counts = Counter(map(repr, values))
    twice = {shown(value) for value, count in counts.items() if count > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} stands there twice")
    return values


def _quoted(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(f"{value}: YAML reads 02:00:00 as a number of seconds; put it in quotes: '02:00:00'")
    return value


def percentage(value: Any) -> float:
    """Return the share that a text such as 2% says; raises ValueError where it says none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{shown(value)} is no percentage such as 2%")
    return float(match[1]) / 100


TrainerName = Annotated[str, AfterValidator(lambda name: known("trainer", name, TRAINERS))]
ModelName = Annotated[str, AfterValidator(lambda name: known("model", name, MODELS))]
# One line of text: what goes to a command line or into a job script can hold no line break and no NUL.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed), AfterValidator(_distinct), Field(min_length=1)]
AUTO: Literal["auto"] = "auto"
# Tagged, so that a mistake in a number is not told as that it is not `auto` as well.
Batch = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[Counts, Tag("counts")],
    Discriminator(lambda value: "auto" if value == AUTO else "counts"),
]
Executions = Annotated[tuple[Execution, ...], BeforeValidator(_listed), AfterValidator(_distinct), Field(min_length=1)]
Precisions = Annotated[tuple[Precision, ...], BeforeValidator(_listed), AfterValidator(_distinct), Field(min_length=1)]


class ModelEntry(Given):
    """A model with the data it sees; what is left out comes from the study, or from the model's usual input."""

    name: ModelName
    data: Line | None = None
    batch: Batch | None = None
    image_size: PositiveInt | None = None
    channels: PositiveInt | None = None
    classes: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Repeats(Given):
    """`min` repeats of every point, and up to `max` of those whose interval is wider than ± `until`, a share of it."""

    min: PositiveInt = _FEWEST_REPEATS
    max: PositiveInt = 10
    until: Annotated[float, BeforeValidator(percentage), Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _in_order(self) -> "Repeats":
        if self.min < _FEWEST_REPEATS:
            raise ValueError(
                f"min {self.min}: an interval of 95 % takes six repeats; use 6 or more, or a fixed number of repeats"
            )
        if self.max < self.min:
            raise ValueError(f"max {self.max} is less than min {self.min}")
        return self


class Container(Given):
    """An image that holds scalestudy and its frameworks: the ranks run in it, the controller outside.

    Pyxis is a plugin of Slurm's; Apptainer runs under every launcher.
    """

    image: Line
    runtime: Literal["pyxis", "apptainer"]
    python: Line = "python3"
    mounts: Annotated[tuple[Line, ...], BeforeValidator(_listed)] = ()


# Tagged, so that a mistake in a container is not told as that it is no text as well.
Environment = Annotated[
    Annotated[Line, Tag("python")] | Annotated[Container, Tag("container")],
    Discriminator(lambda value: "python" if isinstance(value, str) else "container"),
]


class SlurmOptions(Given):
    """How `scalestudy submit` asks Slurm for nodes; what is left out is the cluster's default, or SBATCH_* of the user.

    With `jobs_at_once` every repeat is a job of its own, in an array of which so many run at a time.
    `setup` is lines of shell that run before anything else, such as `module load cuda`.
    """

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    reservation: Line | None = None
    gres: Line | None = None
    time: Annotated[Line, BeforeValidator(_quoted)] | None = None
    exclusive: bool = True
    jobs_at_once: PositiveInt | None = None
    setup: Annotated[tuple[Line, ...], BeforeValidator(_listed)] = ()
    container: Container | None = None


class RayOptions(Given):
    """How ranks find their place on a Ray cluster.

    `runtime_env` is Ray's, for the processes that start the ranks (`py_executable`, `env_vars`, …). A trial waits
    `wait_s` for what others hold, and `scale_up_s` for nodes that an autoscaler has yet to start. `results` is where a
    submitted run keeps its records on the cluster.
    """

    runtime_env: dict[str, Any] = {}
    wait_s: float = Field(default=600.0, ge=0)
    scale_up_s: float = Field(default=0.0, ge=0)
    results: Line = "~/scalestudy"


class Study(Given):
    """One study file. `batch` is the per-device batch in weak scaling and the global batch in strong scaling; `auto`
    is the largest per-device batch that fits.

    `execution` may be given for all trainers or by trainer; who is not named runs as its users do. `options` are by
    trainer, and a list sweeps: every combination is a point of the study.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    max_trials: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = _MOST_TRIALS
    trainers: Annotated[tuple[TrainerName, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
    models: Annotated[tuple[ModelEntry, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
    world_sizes: Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
    scaling: Scaling = "weak"
    batch: Batch | None = None
    data: Line = "synthetic"
    precision: Precisions = ("fp32",)
    execution: dict[TrainerName, Executions] = {}
    options: dict[TrainerName, dict[str, Any]] = {}
    optimizer: Optimizer = Optimizer()
    measurement: Measurement = Measurement()
    repeats: Annotated[
        Annotated[PositiveInt, Tag("fixed")] | Annotated[Repeats, Tag("adaptive")],
        Discriminator(lambda value: "adaptive" if isinstance(value, dict | Repeats) else "fixed"),
    ] = _FEWEST_REPEATS
    # Keras takes no larger one.
    seed: int = Field(default=1, ge=0, le=2**32 - 1)
    launcher: Literal["local", "slurm", "ray"] = "local"
    slurm: SlurmOptions = SlurmOptions()
    ray: RayOptions = RayOptions()
    device: Literal["auto", "cpu", "gpu"] = "auto"
    devices_per_node: Counts | None = None
    threads_per_device: PositiveInt | None = None
    # None: only where a node has fewer cores than its ranks have threads.
    hyper_threads: bool | None = None
    # Whether a trial that uses fewer devices of a node than there are takes others in every repeat: the reference's own
    # speed would else count as the trainer's.
    rotate_devices: bool = True
    # None: what a rank's CPUs can carry on GPU, 1 on CPU.
    loader_workers: Annotated[int, Field(ge=0, le=1024, strict=True)] | None = None
    environments: dict[TrainerName, Environment] = {}
    costs: Costs = Costs()

    @field_validator("trainers", "models", "world_sizes")
    @classmethod
    def _some(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("is empty; name at least one")
        return values

    @field_validator("execution", mode="before")
    @classmethod
    def _execution_of_all(cls, given: Any, info: ValidationInfo) -> Any:
        return given if isinstance(given, dict) else dict.fromkeys(info.data.get("trainers", ()), given)

    @field_validator("options")
    @classmethod
    def _options_exist(cls, given: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        most = info.data.get("max_trials", _MOST_TRIALS)
        for trainer, values in given.items():
            if (count := _combinations(values)) > most:
                counts = " × ".join(f"{len(_listed(value)):,} {shown(name)}" for name, value in values.items())
                raise ValueError(f"{trainer}: {counts} = {count:,} combinations, more than max_trials = {most:,}")
            try:
                option_points(trainer, values)
            except ValidationError as error:
                kind = TRAINERS[trainer].options
                # Raised again as one error of the study's: pydantic takes no other model's.
                raise ValueError("; ".join(f"{trainer}.{_line(mistake, kind)}" for mistake in error.errors())) from None
        return given

    @property
    def adaptive(self) -> Repeats | None:
        """How many repeats there are, where that is decided on the way."""
        return self.repeats if isinstance(self.repeats, Repeats) else None

    @property
    def searches_batch(self) -> bool:
        """Whether some model's batch is yet to be found."""
        return any((model.batch or self.batch) == AUTO for model in self.models)

    @property
    def trial_count(self) -> int:
        """How many trials there are, counted without making one; of adaptive repeats as many as there may be."""
        return math.prod(count for count, _ in self._factors())

    def _factors(self) -> Iterator[tuple[int, str]]:
        """Yield what the trials are the product of, in words."""
        ways = [
            len(self.execution.get(trainer, ("usual",))) * _combinations(self.options.get(trainer, {}))
            for trainer in self.trainers
        ]
        batches = [len(batches) if isinstance(batches, tuple) else 1 for batches in self._batches()]
        trainers, models = _counted(len(ways), "trainer"), _counted(len(batches), "model")
        yield sum(ways), trainers if sum(ways) == len(ways) else f"{sum(ways):,} ways to run {trainers}"
        yield sum(batches), models if sum(batches) == len(batches) else f"{sum(batches):,} batches of {models}"
        repeats = self.repeats.max if isinstance(self.repeats, Repeats) else self.repeats
        for count, what in (
            (len(self.precision), "precision"),
            (len(self.world_sizes), "world size"),
            (len(self.devices_per_node or (1,)), "devices_per_node choice"),
            (repeats, "repeat"),
        ):
            if count > 1:
                yield count, _counted(count, what)

    def _batches(self) -> list[tuple[int, ...] | Literal["auto"] | None]:
        return [model.batch or self.batch for model in self.models]

    @model_validator(mode="after")
    def _not_more_trials_than_meant(self) -> "Study":
        if self.trial_count > self.max_trials:
            product = " × ".join(words for _, words in self._factors())
            raise ValueError(
                f"max_trials: {product} = {self.trial_count:,} trials, more than {self.max_trials:,}; "
                "ask for fewer, or raise max_trials"
            )
        return self

    @model_validator(mode="after")
    def _what_is_given_by_trainer_is_used(self) -> "Study":
        by_field: dict[str, Mapping[str, Any]] = {"options": self.options, "execution": self.execution}
        for field, by_trainer in by_field.items():
            for trainer in by_trainer:
                if trainer not in self.trainers:
                    raise ValueError(
                        f"{field}.{trainer}: the study has no such trainer; add it to trainers or leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _every_model_has_a_batch_that_divides(self) -> "Study":
        for index, model in enumerate(self.models):
            batches = model.batch or self.batch
            if batches is None:
                raise ValueError(f"models.{index} ({model.name}): no batch; give it here or for the whole study")
            if batches == AUTO:
                if self.scaling == "strong":
                    raise ValueError("batch 'auto' is a per-device batch; in strong scaling give the global batch")
                continue
            for batch in batches if self.scaling == "strong" else ():
                for world_size in self.world_sizes:
                    if batch % world_size:
                        raise ValueError(
                            f"batch {batch} does not divide by world size {world_size} (strong scaling shares the "
                            f"global batch out): use a multiple of {world_size}"
                        )
        return self


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _combinations(options: Mapping[str, Any]) -> int:
    return math.prod(len(_listed(value)) for value in options.values())


def option_points(trainer: str, given: Mapping[str, Any]) -> list[Options]:
    """Return a trainer's options for every combination of what is listed; raises ValidationError."""
    kind = TRAINERS[trainer].options
    combinations = itertools.product(*(_distinct(tuple(_listed(value))) for value in given.values()))
    return [kind.model_validate(dict(zip(given, values, strict=True))) for values in combinations]


class Layout(Frozen):
    """What a study leaves to the machine, settled: all trials are of one kind of device, and of as many threads."""

    device: Device
    devices_per_node: tuple[int, ...]
    threads_per_device: int
    hyper_threads: bool = False
    loader_workers: int = 1


def load_study(path: Path) -> Study:
    """Read and check a study file; raises InputError with a line for every mistake in it."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: a study is a mapping of fields such as name and trainers, not {shown(content)}")
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        lines = [f"{path}: {_line(mistake)}" for mistake in mistakes[:_MOST_MISTAKES]]
        if len(mistakes) > _MOST_MISTAKES:
            lines.append(f"{path}: and {len(mistakes) - _MOST_MISTAKES:,} mistakes more")
        raise InputError("\n".join(lines)) from None


def resolve(study: Study, path: Path, topology: Topology) -> Layout:
    """Settle what a study leaves to the machine; raises InputError where a node of `topology` cannot hold it."""
    if study.device != "cpu" and not topology.gpus_per_node:
        if topology.gpu_fault:
            raise InputError(f"{path}: device: {study.device!r}: {topology.gpu_fault}; or use 'cpu'")
        if study.device == "gpu":
            raise InputError(
                f"{path}: device: 'gpu', but no NVIDIA GPU is found here{topology.why_no_more('gpu')}; "
                "use 'cpu' or 'auto'"
            )
    device: Device = "gpu" if topology.gpus_per_node and study.device != "cpu" else "cpu"
    offered, cpus, cores = topology.devices_per_node(device), topology.cpus_per_node, topology.devices_per_node("cpu")
    per_node = study.devices_per_node or (offered,)
    fullest = min(max(study.world_sizes), max(per_node)) or 1
    # A study that asks for them may have a rank on every hardware thread.
    most = offered if device == "gpu" else cpus
    has = f"{offered} {device} devices" + (f" ({cpus} hardware threads)" if most > offered else "")
    if fullest > most:
        raise InputError(
            f"{path}: devices_per_node: {max(per_node)}, but a node has {has}{topology.why_no_more(device)}; "
            f"use at most {most}"
        )
    threads = study.threads_per_device or _fair_share(study, device, topology, fullest)
    if threads * fullest > cpus:
        on_cores = f" on {cores} cores" if cores < cpus else ""
        right = f"{cpus // fullest}" if cpus >= fullest else f"{cpus} devices_per_node"
        raise InputError(
            f"{path}: threads_per_device: {threads} threads × {fullest} devices need {threads * fullest} CPUs, "
            f"there are {cpus}{on_cores}; use at most {right}"
        )
    workers = study.loader_workers
    if workers is None:
        # A GPU eats images faster than one process decodes them: all the rank's CPUs but the one that feeds the GPU.
        # On CPU a worker takes its CPU from the training.
        workers = max(1, threads - 1) if device == "gpu" else 1
    too_few = threads * fullest > cores
    if too_few and study.hyper_threads is False:
        raise InputError(
            f"{path}: hyper_threads: false, but {threads} threads × {fullest} devices need {threads * fullest} cores, "
            f"there are {cores} ({cpus} hardware threads); use true, or at most {cores // fullest} threads_per_device"
        )
    return Layout(
        device=device,
        devices_per_node=per_node,
        threads_per_device=threads,
        hyper_threads=too_few if study.hyper_threads is None else study.hyper_threads,
        loader_workers=workers,
    )


def _fair_share(study: Study, device: Device, topology: Topology, fullest: int) -> int:
    """Return the threads of a device where the study gives none: one a core, as torch has it by itself."""
    available = topology.cpus_per_node if study.hyper_threads else topology.devices_per_node("cpu")
    # That of one GPU among all of its node, however few the study uses: so much lies near each GPU, and a larger world
    # size that is added later changes nothing. A CPU study takes the whole node at its largest world size.
    return max(1, available // (topology.gpus_per_node if device == "gpu" else fullest))


def study_trials(study: Study, path: Path, layout: Layout) -> list[Trial]:
    """Return every trial in the order to run them: repeat by repeat, each shuffled by the study's seed; of adaptive
    repeats as many as there may be.

    Raises InputError for what only the data or the device can tell: folders, image sizes, what does not exist there,
    and for a batch that is yet to be found.
    """
    block = [
        Trial(
            trainer=trainer,
            model=model.name,
            data=data,
            scaling=study.scaling,
            world_size=world_size,
            devices_per_node=per_node,
            device=layout.device,
            per_device_batch=batch // (world_size if study.scaling == "strong" else 1),
            precision=precision,
            execution=execution,
            options=options,
            optimizer=study.optimizer,
            measurement=study.measurement,
            threads_per_device=layout.threads_per_device,
            hyper_threads=layout.hyper_threads,
            loader_workers=layout.loader_workers,
            seed=study.seed,
            repeat=0,
            rotate_devices=study.rotate_devices,
        )
        for model, data in [(model, _data(study, model, path)) for model in study.models]
        for batch in _batches(study, model, path)
        for precision in study.precision
        for trainer in study.trainers
        for execution in study.execution.get(trainer, (TRAINERS[trainer].execution,))
        for options in option_points(trainer, study.options.get(trainer, {}))
        for world_size in study.world_sizes
        for per_node in layout.devices_per_node
    ]
    seen: set[str] = set()
    for trial in block:
        if trial.id in seen:
            raise InputError(
                f"{path}: {trial.model} ({trial.data.name}), {trial.per_device_batch} images a device, "
                f"{trial.precision}, {series_name(trial)}, world size {trial.world_size}: is asked for twice; two "
                "entries of models or options come to the same: leave one out"
            )
        seen.add(trial.id)
        if refused := refusal(trial):
            raise InputError(f"{path}: {refused[0]}: {refused[1]}")
    trials: list[Trial] = []
    for repeat in range(study.repeats.max if isinstance(study.repeats, Repeats) else study.repeats):
        shuffled = [trial.model_copy(update={"repeat": repeat}) for trial in block]
        random.Random(f"{study.seed} {repeat}").shuffle(shuffled)
        trials += shuffled
    return trials


def _batches(study: Study, model: ModelEntry, path: Path) -> tuple[int, ...]:
    batches = model.batch or study.batch or ()
    if batches == AUTO:
        raise InputError(
            f"{path}: batch: 'auto' is found by `scalestudy run` of the whole study, also in one allocation by "
            "`sbatch slurm/scale.sh`; here give the number that it found"
        )
    return tuple(map(int, batches))


def _data(study: Study, model: ModelEntry, path: Path) -> Data:
    """Resolve a model's data: `images:DIR` and `mnist:DIR` relative to the study file."""
    text = model.data or study.data
    source, _, argument = text.partition(":")
    field = f"models.{model.name}.data" if model.data else "data"
    try:
        known("data source", source, [name.partition(":")[0] for name in SOURCES])
        if bool(argument) != (source in ("images", "mnist")):
            raise ValueError(f"{shown(text)} is none of {', '.join(SOURCES)}")
    except ValueError as error:
        raise InputError(f"{path}: {field}: {error}") from None
    try:
        folder = (path.parent / Path(argument).expanduser()).resolve() if argument else None
        fixed = _fixed_shape(source, folder)
        # A record is UTF-8: a name of other bytes could not be written there.
        str(folder).encode()
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{path}: {field}: {error}") from None
    usual = {"channels": 1, "image_size": 32, "classes": 10}
    if model.name != "cnn" and fixed.get("channels") != 1:
        usual = {"channels": 3, "image_size": 224, "classes": 1000}
    given = model.model_dump(include={"channels", "image_size", "classes"}, exclude_none=True)
    for name in fixed.keys() & given.keys():
        if fixed[name] != given[name]:
            raise InputError(
                f"{path}: models.{model.name}.{name}: {given[name]}, but {text} has {fixed[name]}; leave it out"
            )
    shape = {**usual, **fixed, **given}
    if source == "mnist" and shape["image_size"] < 28:
        raise InputError(f"{path}: models.{model.name}.image_size: {shape['image_size']}, but MNIST's images have 28")
    data = Data.model_validate({"source": source, "folder": str(folder) if folder else None, **shape})
    try:
        model_spec(model.name, data)
    except ValueError as error:
        raise InputError(f"{path}: models.{model.name}.image_size: {shape['image_size']}: {error}") from None
    return data


def _fixed_shape(source: str, folder: Path | None) -> Mapping[str, int]:
    """Return what the data themselves fix; raises ValueError where a folder does not hold them."""
    if source == "images":
        assert folder is not None
        return {"channels": 3, "classes": len(class_names(folder))}
    if source == "mnist":
        assert folder is not None
        mnist_files(folder)
    return {"channels": 1, "classes": 10} if source in ("mnist", "digits") else {}


# Names of ours for the ways in which a value may be written, which nobody wrote.
_TAGS = {"auto", "counts", "fixed", "adaptive"}


def _line(mistake: ErrorDetails, root: type[Frozen] = Study) -> str:
    """Say one of pydantic's findings about a `root` in our words."""
    where = ".".join(map(_printable, (part for part in mistake["loc"] if part not in _TAGS)))
    if mistake["type"] == "extra_forbidden":
        parents: dict[str, type[Frozen]] = {
            "models": ModelEntry,
            "optimizer": Optimizer,
            "measurement": Measurement,
            "container": Container,
            "slurm": SlurmOptions,
            "ray": RayOptions,
            "repeats": Repeats,
            "costs": Costs,
        }
        model = next((parents[name] for name in map(str, reversed(mistake["loc"][:-1])) if name in parents), root)
        fields = [field.alias or name for name, field in model.model_fields.items()]
        try:
            known("field", str(mistake["loc"][-1]), fields)
        except ValueError as error:
            return f"{where}: {error}"
    if mistake["type"] == "missing":
        return f"{where}: is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {shown(mistake['input'])}: {message[0].lower()}{message[1:]}"


def _printable(part: int | str) -> str:
    text = str(part)
    return text if text.isprintable() and len(text) <= _SHOWN else shown(part)
