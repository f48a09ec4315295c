"""One rank of an equality test: take a number of steps, leave parameters and each step's loss as rank-N.npz."""

import os
import sys
from pathlib import Path

import numpy as np

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
trial = Trial.model_validate_json((folder / "trial.json").read_bytes())
rank = Rank.from_environ(os.environ)
trainer = TRAINERS[trial.trainer].load()(trial, rank)
trainer.build()
losses = []
for _ in range(steps):
    trainer.step()
    losses.append(trainer.loss())
trainer.synchronize()
for replica, parameters in enumerate(trainer.replicas()):
    np.savez(folder / f"rank-{rank.rank + replica}.npz", losses=losses, **dict(parameters))
trainer.close()
os._exit(0)
