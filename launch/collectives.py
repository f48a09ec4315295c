"""The trials of `scalestudy collectives`: every trainer's all-reduce at every world size of a study."""

import re
from pathlib import Path
from typing import Any

from scalestudy.launch.errors import InputError
from scalestudy.launch.study import Layout, Study, study_trials
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Sweep, Trial

MODEL = "all-reduce"
_UNITS = {"": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}


def parse_bytes(option: str, text: str) -> int:
    """Return the bytes that a text such as 64MB says, in powers of 1024; raises InputError where it says none."""
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB|)", text.strip().upper())
    if match is None or int(match[1]) * _UNITS[match[2]] % 4 or int(match[1]) == 0:
        raise InputError(f"{option}: {text!r} is no size such as 1KB, 64MB or 1GB, in whole float32 values of 4 bytes")
    return int(match[1]) * _UNITS[match[2]]


def sweep_trials(study: Study, path: Path, layout: Layout, plan: Sweep) -> list[Trial]:
    """Return a trial for every trainer, world size above 1, placement and repeat of a study, in its order.

    Raises InputError where every world size is 1: nothing is exchanged there.
    """
    if max(study.world_sizes) == 1:
        raise InputError(f"{path}: world_sizes: 1: one device has nobody to exchange with; add 2 or more")
    changes: dict[str, Any] = {
        # What is reduced does not depend on them.
        "models": study.models[:1],
        "execution": {},
        "options": {},
        "precision": ("fp32",),
        "repeats": study.adaptive.min if study.adaptive else study.repeats,
        "world_sizes": tuple(size for size in study.world_sizes if size > 1),
    }
    one_model = study.model_copy(update=changes)
    first = one_model.models[0].model_copy(update={"batch": (max(study.world_sizes),), "data": "synthetic"})
    return [
        trial.model_copy(
            update={
                "model": MODEL,
                "data": Data(source="synthetic", channels=1, image_size=1, classes=1),
                "scaling": "weak",
                "per_device_batch": 1,
                "execution": TRAINERS[trial.trainer].execution,
                "sweep": plan,
            }
        )
        for trial in study_trials(one_model.model_copy(update={"models": (first,)}), path, layout)
    ]
