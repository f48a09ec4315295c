"""The Ray launcher: a placement group for every trial, an actor for every rank, results home through Ray."""

import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scalestudy.cluster.cpu_claims import CpuClaim
from scalestudy.cluster.host import NodeOffer, Topology, usable_cpus
from scalestudy.cluster.network import joined
from scalestudy.cluster.ports import hold_port
from scalestudy.cluster.processors import processors
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.launch.children import ask_for_stacks, kill_group
from scalestudy.launch.errors import InputError
from scalestudy.launch.launcher import Exit, NoCapacityError, Program, processes, worker_command, worker_variables
from scalestudy.launch.study import Study
from scalestudy.trainers.pinning import GIVEN, rank_cpus, rank_gpus
from scalestudy.trainers.trial import Trial

_TICK_S = 1.0
# When one rank has failed the others get so long to fail by themselves, so that their logs say what they saw.
_GRACE_S = 3.0
# A node's loss is known to Ray some heartbeats after its actors are gone.
_NODE_NEWS_S = 20.0
_ANSWER_S = 30.0
# Whole, or the parts that a sampler which died has left.
_TELEMETRY = ("telemetry-*.parquet", "telemetry-*.parts/*.parquet")


class Place(NamedTuple):
    """Where an actor is: its node, how others reach it, and the devices it was given."""

    node_id: str
    host: str
    address: str
    port: int
    gpus: tuple[str, ...]


class Left(NamedTuple):
    """What a rank left: its exit code, negative for a signal, and its files by their place in the trial's folder."""

    code: int
    files: dict[str, bytes]


class RankActor:
    """Runs one rank as a process of its own, on a node that may share no file with the driver."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="scalestudy-"))
        # Held as long as the actor lives.
        self._claim: CpuClaim | None = None
        # Held until the rank binds it, so that no other trial finds it free.
        self._port = hold_port(None)
        self._process: subprocess.Popen[bytes] | None = None

    def place(self) -> Place:
        """Say where this is."""
        return Place(
            node_id=ray.get_runtime_context().get_node_id(),
            host=os.uname().nodename,
            address=ray.util.get_node_ip_address(),
            port=self._port.getsockname()[1],
            gpus=tuple(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))),
        )

    def run(
        self, trial: Trial, rank: Rank, addresses: list[str], gpus: tuple[str, ...], program: Program | None
    ) -> Left:
        """Run the rank to its end; raises OSError where its program cannot be started."""
        (self._folder / "trial.json").write_text(trial.model_dump_json(by_alias=True), encoding="utf-8")
        log_name = f"rank-{rank.rank}.log"
        self._claim = claim_cpus(trial, rank, gpus)
        environment = {
            **os.environ,
            **rank_environ(rank, addresses),
            **worker_variables(os.environ, trial, rank.world_size),
            GIVEN: ",".join(map(str, self._claim.cpus)),
        }
        if gpus:
            # All of the node's: shut off from each other, NCCL could not use NVLink between them.
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        ranks_end, our_end = os.pipe()
        self._port.close()
        try:
            with (self._folder / log_name).open("wb") as log:
                self._process = subprocess.Popen(
                    worker_command(program or sys.executable, trial, self._folder),
                    env=environment,
                    stdin=ranks_end,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._process.wait()
            kill_group(self._process)
        finally:
            os.close(our_end)
            os.close(ranks_end)
        patterns = [log_name, f"rank-{rank.rank}.json", "progress.jsonl", *_TELEMETRY]
        found = [path for pattern in patterns for path in self._folder.glob(pattern)]
        files = {str(path.relative_to(self._folder)): path.read_bytes() for path in found}
        left = Left(self._process.returncode, files)
        shutil.rmtree(self._folder, ignore_errors=True)
        return left

    def progress(self) -> bytes:
        """Return the last line that the rank told of how far it is."""
        try:
            return (self._folder / "progress.jsonl").read_bytes().splitlines(keepends=True)[-1]
        except (FileNotFoundError, IndexError):
            return b""

    def stop(self) -> None:
        """Have the rank say where it stands, and kill it, so that `run` returns with what it left."""
        if self._process is not None:
            ask_for_stacks([self._process])
            kill_group(self._process)


class RayLauncher:
    """Ranks on the cluster that this process is a driver of, or can reach by RAY_ADDRESS."""

    name = "ray"
    elastic = True

    def __init__(self, study: Study, programs: Mapping[str, Program]) -> None:
        self._study = study
        self._least = max(study.devices_per_node or (1,))
        self._programs = programs
        here = Path.cwd()
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level=logging.ERROR)
        # RuntimeError: another version of Ray or of Python than the cluster's.
        except (OSError, RayError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--launcher: ray: no cluster here ({' '.join(str(error).split())[:200]}); start one with "
                "`ray start --head`, or run there: ray job submit --working-dir . -- scalestudy run …"
            ) from None
        # In a job Ray moves its driver to another copy of the working directory.
        os.chdir(here)

    def capacity(self) -> Topology:
        # Ray counts CPUs, and does not know which of them are hardware threads of one core.
        offers = [NodeOffer(cpus, gpus) for cpus, gpus in _alive().values()]
        there = Topology.of(offers, self._study.device, self._least)
        if not self._study.ray.scale_up_s:
            return there
        # What an autoscaler may start is known only from what the study says of it.
        per_node = max(self._study.devices_per_node or (0,))
        return Topology(
            nodes=sys.maxsize,
            cpus_per_node=max(there.cpus_per_node, per_node * (self._study.threads_per_device or 1)),
            gpus_per_node=max(there.gpus_per_node, per_node if self._study.device == "gpu" else 0),
        )

    def scheduler(self) -> dict[str, str]:
        return {"Ray": ray.__version__, "Ray job": ray.get_runtime_context().get_job_id()}

    def resume(self, *, advanced: bool) -> None:
        return None

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        group = self._reserve(trial, tick)
        actors: list[Any] = []
        try:
            count = processes(trial)
            actors = self._actors(trial, group, count)
            try:
                places: list[Place] = ray.get([actor.place.remote() for actor in actors], timeout=deadline_s)
            except RayError as error:
                raise OSError(_said(error)) from None
            addresses = [joined(place.address, place.port) for place in places]
            running = {
                actor.run.remote(
                    trial, rank, addresses, gpus_of(places, rank), self._programs.get(trial.trainer)
                ): rank.rank
                for actor, rank in zip(actors, ranks_of(places, _per_node(trial)), strict=True)
            }
            return self._watch(actors, running, places, folder, deadline_s, tick)
        finally:
            for actor in actors:
                ray.kill(actor)
            remove_placement_group(group)

    def _reserve(self, trial: Trial, tick: Callable[[], None]) -> PlacementGroup:
        """Return a group of one bundle a node; raises NoCapacityError where none can be had in time."""
        node = bundles(trial)
        holding = [cpus >= node[0]["CPU"] and gpus >= node[0].get("GPU", 0) for cpus, gpus in _alive().values()]
        fits = sum(holding) >= trial.nodes
        patience_s = self._study.ray.wait_s if fits else self._study.ray.scale_up_s
        group: PlacementGroup = placement_group(node, strategy="STRICT_PACK" if len(node) == 1 else "STRICT_SPREAD")
        ends_s = time.monotonic() + patience_s
        try:
            while not group.wait(_TICK_S):
                tick()
                if time.monotonic() > ends_s:
                    there = ", ".join(f"{cpus} CPUs and {gpus} GPUs" for cpus, gpus in _alive().values()) or "no node"
                    raise NoCapacityError(
                        f"needs {trial.nodes} nodes with {_resources(node[0])}, and none came free within "
                        f"{patience_s:g} s; the cluster's nodes have {there}"
                    )
        except BaseException:
            remove_placement_group(group)
            raise
        return group

    def _actors(self, trial: Trial, group: PlacementGroup, count: int) -> list[Any]:
        devices = trial.world_size // count
        cpus = trial.threads_per_device * devices
        actor: Any = ray.remote(RankActor)
        return [
            actor.options(
                num_cpus=cpus,
                num_gpus=devices if trial.device == "gpu" else 0,
                # Two threads beside the one that waits for the rank: to ask how far it is, and to stop it.
                max_concurrency=3,
                runtime_env=self._study.ray.runtime_env,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=rank // _per_node(trial)
                ),
            ).remote()
            for rank in range(count)
        ]

    def _watch(
        self,
        actors: list[Any],
        running: dict[Any, int],
        places: list[Place],
        folder: Path,
        deadline_s: float,
        tick: Callable[[], None],
    ) -> Exit:
        """Wait for all ranks; when one fails, or the deadline is over, stop the others and take what they left."""
        ends_s = time.monotonic() + deadline_s
        codes: dict[int, int] = {}
        first_failed: int | None = None
        timed_out, stopped, actor_gone = False, False, False
        while running:
            ready, _ = ray.wait(list(running), timeout=min(_TICK_S, max(0.0, ends_s - time.monotonic())))
            for finished in ready:
                rank = running.pop(finished)
                try:
                    left: Left = ray.get(finished)
                except RayError as error:
                    if cause := getattr(error, "cause", None):
                        raise OSError(f"rank {rank}: {cause}") from None
                    # The actor is gone, and its files with it.
                    (folder / f"rank-{rank}.log").write_text(
                        f"{_said(error)}\n", encoding="utf-8", errors="backslashreplace"
                    )
                    left, actor_gone = Left(-9, {}), True
                for name, content in left.files.items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes(content)
                codes[rank] = left.code
                if left.code and first_failed is None and not timed_out:
                    first_failed = rank
                    ends_s = min(ends_s, time.monotonic() + _GRACE_S)
            if running and time.monotonic() >= ends_s:
                if stopped:
                    # A rank that does not even die is left to `ray.kill`.
                    codes |= dict.fromkeys(running.values(), -9)
                    break
                timed_out, stopped = first_failed is None, True
                for rank in running.values():
                    actors[rank].stop.remote()
                ends_s = time.monotonic() + _ANSWER_S
            self._note_progress(actors[0], folder)
            tick()
        lost = _lost(places) if actor_gone else ()
        return Exit(tuple(codes[rank] for rank in range(len(actors))), timed_out, first_failed, lost)

    def _note_progress(self, actor: Any, folder: Path) -> None:
        try:
            line: bytes = ray.get(actor.progress.remote(), timeout=_TICK_S)
        except RayError:
            return
        if line:
            (folder / "progress.jsonl").write_bytes(line)


def bundles(trial: Trial) -> list[dict[str, float]]:
    """Return what each node of a trial must have, in the order of its ranks; the last may hold fewer."""
    devices = [
        min(trial.devices_per_node, trial.world_size - first)
        for first in range(0, trial.world_size, trial.devices_per_node)
    ]
    return [
        {"CPU": float(count * trial.threads_per_device), **({"GPU": float(count)} if trial.device == "gpu" else {})}
        for count in devices
    ]


def claim_cpus(trial: Trial, rank: Rank, gpus: tuple[str, ...], folder: Path | None = None) -> CpuClaim:
    """Claim the CPUs of a rank, near its GPU; others if another trial has some of them."""
    usable = processors(usable_cpus())
    near = rank_gpus(trial, ",".join(gpus))
    # What Ray counts as CPUs are hardware threads: a rank that took as many whole cores would take another's.
    wanted = rank_cpus(trial, rank, usable, near, hyper_threads=True)
    count = trial.threads_per_device * (trial.world_size // rank.world_size)
    return CpuClaim(usable, count, wanted, folder, holder=f"process {os.getpid()}, trial {trial.id}, by Ray")


def ranks_of(places: list[Place], per_node: int) -> list[Rank]:
    """Return every rank; `places` is in rank order, node by node."""
    count = len(places)
    return [
        Rank(
            rank=rank,
            world_size=count,
            local_rank=rank % per_node,
            local_world_size=min(per_node, count - rank // per_node * per_node),
            node_rank=rank // per_node,
            host=place.host,
        )
        for rank, place in enumerate(places)
    ]


def _per_node(trial: Trial) -> int:
    return min(processes(trial), trial.devices_per_node)


def gpus_of(places: list[Place], rank: Rank) -> tuple[str, ...]:
    """Return all GPUs of the rank's node that the trial was given: local rank 0 takes the first of them."""
    first = rank.rank - rank.local_rank
    # Ray gives them out in any order; by length first, as `10` comes after `9`.
    given = [gpu for place in places[first : first + rank.local_world_size] for gpu in place.gpus]
    return tuple(sorted(given, key=lambda gpu: (len(gpu), gpu)))


def _alive() -> dict[str, tuple[int, int]]:
    """Return CPUs and GPUs of every node that is alive and takes work, by its id."""
    return usable_nodes(ray.nodes())


def usable_nodes(told: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Take apart what Ray tells of its nodes; raises OSError with Ray's words where it cannot be."""
    found: dict[str, tuple[int, int]] = {}
    for node in told:
        try:
            resources = (node["Alive"] and node.get("Resources")) or {}
            if cpus := math.floor(resources.get("CPU") or 0):
                found[node["NodeID"]] = cpus, math.floor(resources.get("GPU") or 0)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise OSError(f"Ray tells of a node that cannot be understood: {str(node)[:300]}") from None
    return found


def _lost(places: list[Place]) -> tuple[str, ...]:
    """Return which of a trial's nodes are gone, after an actor of it is."""
    ends_s = time.monotonic() + _NODE_NEWS_S
    while True:
        alive = _alive()
        lost = {place.node_id: place.host for place in places if place.node_id not in alive}
        if lost or time.monotonic() > ends_s:
            return tuple(f"{host} ({node_id[:8]})" for node_id, host in lost.items())
        time.sleep(_TICK_S)


def _resources(bundle: dict[str, float]) -> str:
    return " and ".join(f"{count:g} {name}s" for name, count in bundle.items())


def _said(error: RayError) -> str:
    """Return Ray's words in one line: they come with banners and tracebacks."""
    return " ".join(str(error).split())[:500]
