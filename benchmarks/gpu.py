"""What one GPU shows: our loop against a bare one and another's model, telemetry's tax, joules, share of the roofline.

Usage: python benchmarks/gpu.py OUT.json [--device cpu]   (with torch; torchvision or timm for the third column)

Everything that is compared takes turns in one process, in windows of half a second; ratios are medians over rounds.
What does not fit into the eight minutes is written down as left out. `--device cpu` runs the same on small sizes, to
try the script where there is no GPU: its figures say nothing.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from telemetry_tax import Sampler
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.cluster.sample_file import read_samples
from scalestudy.cluster.telemetry import Sampling
from scalestudy.trainers import torch_models
from scalestudy.trainers.measure import steps_for, timed_window
from scalestudy.trainers.models import model_spec
from scalestudy.trainers.torch_trainer import make_optimizer
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial

BUDGET_S = 450.0
WINDOW_S = 0.5
ROUNDS = 3
TAX_ROUNDS = 24
TESTS = Path(__file__).resolve().parents[1] / "tests/trainers/test_gpu.py"
RANK = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")
# Model, image size and batch: on a GPU as they are trained, on a CPU as small as can be.
SIZES = {
    "gpu": [("cnn", 32, 1024), ("resnet18", 224, 256), ("resnet50", 224, 128), ("resnet152", 224, 64)],
    "cpu": [("cnn", 32, 64), ("resnet18", 32, 4)],
}
# In the order of what is worth most, as the time may run out: compiling resnet152 takes minutes.
WAYS = [("bf16", "eager"), ("fp32", "eager"), ("bf16", "compiled"), ("fp32", "compiled")]


def main() -> None:
    """Measure all there is time for, and write it."""
    asked = argparse.ArgumentParser()
    asked.add_argument("out", type=Path)
    asked.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    given = asked.parse_args()
    os.environ |= rank_environ(RANK, [f"127.0.0.1:{free_ports(1)[0]}"])
    ends_s = time.monotonic() + BUDGET_S
    found: dict[str, Any] = {"machine": machine(given.device), "checks": checks(), "cases": [], "left_out": []}
    found["roofline"] = {precision: roofline(given.device, precision) for precision in ("fp32", "bf16")}
    found["telemetry_tax"] = telemetry_tax(given.device)
    for precision, execution in WAYS:
        for model, image_size, batch in SIZES[given.device]:
            case = {"model": model, "batch": batch, "precision": precision, "execution": execution}
            if time.monotonic() > ends_s:
                found["left_out"].append({**case, "why": f"{BUDGET_S:g} s were over"})
                continue
            trial = trial_of(given.device, model, image_size, batch, precision, execution)
            found["cases"].append(case | measured(trial, found["roofline"][precision]))
            print(json.dumps(found["cases"][-1]), flush=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n")


def trial_of(device: Any, model: str, image_size: int, batch: int, precision: Any, execution: Any) -> Trial:
    """Return the trial of one process on one device."""
    channels, classes = (1, 10) if model == "cnn" else (3, 1000)
    return Trial(
        trainer="torch-ddp",
        model=model,
        data=Data(source="synthetic", channels=channels, image_size=image_size, classes=classes),
        scaling="weak",
        world_size=1,
        devices_per_node=1,
        device=device,
        per_device_batch=batch,
        precision=precision,
        execution=execution,
        options=TRAINERS["torch-ddp"].options(),
        optimizer=Optimizer(),
        measurement=Measurement(),
        threads_per_device=1 if device == "cpu" else 4,
        seed=1,
        repeat=0,
    )


@contextmanager
def training(trial: Trial) -> Iterator[Any]:
    """Yield our trainer, past its first steps, and free its memory afterwards."""
    os.environ["MASTER_PORT"] = str(free_ports(1)[0])
    trainer: Any = TRAINERS[trial.trainer].load()(trial, RANK)
    trainer.build()
    for _ in range(3):
        trainer.step()
    trainer.synchronize()
    try:
        yield trainer
    finally:
        trainer.close()
        del trainer
        gc.collect()
        if trial.device == "gpu":
            torch.cuda.empty_cache()


def measured(trial: Trial, peak: dict[str, float]) -> dict[str, Any]:
    """Return images/s of our loop, of a bare one and of another's model, and what our loop's took of the device."""
    with training(trial) as trainer, tempfile.TemporaryDirectory() as name:
        images, labels = next(trainer._batches)
        networks = {"bare": torch_models.build(model_spec(trial.model, trial.data)), "other": others(trial.model)}
        loops = {key: bare(trial, network, images, labels) for key, network in networks.items() if network}
        contestants: dict[str, Callable[[int], float]] = {"ours": lambda steps: seconds(timed_window(trainer, steps))}
        contestants |= {key: timed(loop, trainer.synchronize) for key, loop in loops.items()}
        for contestant in contestants.values():
            contestant(3)
        steps = steps_for(WINDOW_S, max(contestant(5) for contestant in contestants.values()) / 5)
        took_s: dict[str, list[float]] = {key: [] for key in contestants}
        for index in range(ROUNDS):
            for key in [*contestants][index % len(contestants) :] + [*contestants][: index % len(contestants)]:
                took_s[key].append(contestants[key](steps))
        sampling = Sampling(Path(name), 0, "here", rate_hz=50)
        time.sleep(1.5)
        window = timed_window(trainer, 4 * steps)
        time.sleep(0.2)
        telemetry = sampling.stop()
        samples = read_samples(Path(name) / telemetry.file)
        flops = flops_per_image(trial, images, labels)
    images_per_s = {key: trial.per_device_batch * steps / median(values) for key, values in took_s.items()}
    gpu = samples[(samples.device == "gpu0") & samples.energy_j.notna()]
    energy_j = np.diff(np.interp([window.start_s, window.end_s], gpu.time_s, gpu.energy_j)) if len(gpu) else [np.nan]
    inside = samples[samples.time_s.between(window.start_s, window.end_s) & (samples.device == "gpu0")]
    achieved = flops * images_per_s["ours"]
    return {
        "images_per_s": images_per_s,
        "ours_over_bare": median(b / a for a, b in zip(took_s["ours"], took_s["bare"], strict=True)),
        "ours_over_other": median(b / a for a, b in zip(took_s["ours"], took_s["other"], strict=True))
        if "other" in took_s
        else None,
        "device_clock_over_host_clock": window.device_s and window.device_s / seconds(window),
        "joules_per_image": known(float(energy_j[0]) / (4 * steps * trial.per_device_batch)),
        "power_w": known(inside.power_w.mean()),
        "busy": known(inside.busy.mean()),
        "sm_active": known(inside.sm_active.mean()),
        "flops_per_image": flops,
        "share_of_peak_flops": achieved / peak["flops_per_s"],
        # As the device counts it; null where it does not.
        "share_of_memory_bandwidth": known(inside.dram_active.mean()),
    }


def bare(trial: Trial, network: Any, images: Any, labels: Any) -> Callable[[int], None]:
    """Return a loop as a user of DDP writes it, with the memory format, precision and optimizer that ours has."""
    network.to(images.device)
    fast = trial.device == "gpu" and trial.precision != "fp32"
    memory_format = torch.channels_last if fast else torch.contiguous_format
    network.to(memory_format=memory_format)
    images = images.contiguous(memory_format=memory_format)
    optimizer = make_optimizer(trial.optimizer, network, images.device)
    model: Any = DistributedDataParallel(network)
    if trial.execution == "compiled":
        model = torch.compile(model)

    def loop(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=trial.precision == "bf16"):
                loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

    return loop


def others(model: str) -> Any:
    """Return torchvision's or timm's model of that name, or None."""
    try:
        import torchvision

        return getattr(torchvision.models, model, lambda: None)()
    except ImportError:
        pass
    try:
        import timm

        return timm.create_model(model) if model in timm.list_models() else None
    except ImportError:
        return None


def timed(loop: Callable[[int], None], synchronize: Callable[[], None]) -> Callable[[int], float]:
    """Return the loop with the seconds that it takes."""

    def run(steps: int) -> float:
        synchronize()
        began_s = time.perf_counter()
        loop(steps)
        synchronize()
        return time.perf_counter() - began_s

    return run


def telemetry_tax(device: str) -> dict[str, float]:
    """Return throughput with the sampler at each rate over that without, and of two windows without (noise)."""
    model, image_size, batch = SIZES[device][-2]
    trial = trial_of(device, model, image_size, batch, "bf16", "eager")
    with training(trial) as trainer, tempfile.TemporaryDirectory() as name:
        samplers = [Sampler(Path(name), number, rate_hz) for number, rate_hz in enumerate((10.0, 100.0))]
        time.sleep(3)
        for sampler in samplers:
            sampler.hold()
        steps = steps_for(WINDOW_S, seconds(timed_window(trainer, 10)) / 10)
        took_s: list[list[float]] = []
        for index in range(TAX_ROUNDS):
            row = [0.0] * 4
            for place in range(4):
                who = (index + place) % 4
                active = samplers[who - 1] if who in (1, 2) else None
                if active:
                    active.go_on()
                row[who] = seconds(timed_window(trainer, steps))
                if active:
                    active.hold()
            took_s.append(row)
        for sampler in samplers:
            sampler.stop()
    none = [(row[0] + row[3]) / 2 for row in took_s]
    return {
        "10_hz_over_none": median(plain / row[1] for plain, row in zip(none, took_s, strict=True)),
        "100_hz_over_none": median(plain / row[2] for plain, row in zip(none, took_s, strict=True)),
        "none_over_none": median(row[0] / row[3] for row in took_s),
    }


def roofline(device: str, precision: str) -> dict[str, float]:
    """Return what the device reaches here: FLOP/s of a large product of matrices, and bytes/s of a large copy."""
    kind = "cuda" if device == "gpu" else "cpu"
    side = 8192 if device == "gpu" else 512
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.rand(side, side, device=kind, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 if device == "gpu" else 2**22, device=kind)
    target = torch.empty_like(source)
    product_s = best_s(lambda: left @ right, kind)
    copy_s = best_s(lambda: target.copy_(source), kind)
    return {"flops_per_s": 2 * side**3 / product_s, "bytes_per_s": 2 * source.nbytes / copy_s}


def best_s(work: Callable[[], Any], kind: str) -> float:
    """Return the shortest of ten times."""
    found = []
    for _ in range(10):
        if kind == "cuda":
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began_s)
    return min(found)


def flops_per_image(trial: Trial, images: Any, labels: Any) -> float:
    """Return the FLOPs of forward and backward, as torch counts those of convolutions and products."""
    network = torch_models.build(model_spec(trial.model, trial.data)).to(images.device)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(network(images[:2]), labels[:2]).backward()
    return float(counter.get_total_flops()) / 2


def checks() -> dict[str, Any]:
    """Return how the tests that need a GPU ended."""
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS], capture_output=True, text=True
    )
    return {"exit_code": told.returncode, "said": (told.stdout + told.stderr).splitlines()[-20:]}


def machine(device: str) -> dict[str, str]:
    """Return what this was measured on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if device == "gpu":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def seconds(window: Any) -> float:
    """Return how long a window lasted."""
    return float(window.end_s - window.start_s)


def known(value: float) -> float | None:
    """Return the value, or None for what is no number: JSON has none."""
    return None if np.isnan(value) else float(value)


if __name__ == "__main__":
    main()
