"""One rank of an equality test: take a number of steps, leave parameters and each step's loss as rank-N.npz.

With the name of a Keras dtype policy behind it, TensorFlow computes in that. With INTERLUDE set the parts of a step are
timed half-way. What torch.compile has made is counted.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.measure import measure_causes
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
trial = Trial.model_validate_json((folder / "trial.json").read_bytes())
rank = Rank.from_environ(os.environ)
trainer = TRAINERS[trial.trainer].load()(trial, rank)
if len(sys.argv) > 3:
    import keras

    keras.config.set_dtype_policy(sys.argv[3])
trainer.build()
losses = []
for step in range(steps):
    if step == steps // 2 and "INTERLUDE" in os.environ:
        measure_causes(trainer, 2, 3, resident=True, alone=trial.world_size == 1)
    trainer.step()
    losses.append(trainer.loss())
trainer.synchronize()
compiled = len(list(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/nowhere")).rglob("*.so")))
for replica, parameters in enumerate(trainer.replicas()):
    told: Any = {"losses": losses, "compiled": compiled, **dict(parameters)}
    np.savez(folder / f"rank-{rank.rank + replica}.npz", **told)
trainer.close()
os._exit(0)
