"""One rank of an equality test: take a number of steps, leave parameters and each step's loss as rank-N.npz.

With the name of a Keras dtype policy behind it, TensorFlow computes in that. With INTERLUDE set the parts of a step are
timed half-way. What torch.compile has made is counted. With LOOK set, what the trainer says of itself and where
TensorFlow has put things is left as look-N.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.measure import measure_causes
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial


def looked(trainer: Any) -> dict[str, Any]:
    """Return the trainer's settings; of a tf.distribute trainer also devices, and the operations of its graphs."""
    found: dict[str, Any] = {"settings": trainer.settings()}
    if not hasattr(trainer, "_strategy"):
        return found
    results = trainer._strategy.experimental_local_results
    found["resident"] = [[value.device for value in results(part)] for part in trainer._resident]
    found["local"] = [
        sorted({variable.value.device for variable in [*network.variables, *optimizer.variables]})
        for network, optimizer, *_ in trainer._local_networks
    ]
    trainer.exchange_step()
    found["zeros"] = sorted({tuple(value.device for value in results(zeros)) for zeros in trainer._zeros})
    for name in ("take", "train"):
        graph = getattr(trainer, f"_{name}").get_concrete_function().graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        found[name] = sorted({node.op for node in nodes})
        hints = {node.attr["communication_hint"].s.decode() for node in nodes if "Collective" in node.op}
        found[f"{name}_hints"] = sorted(filter(None, hints))
    return found


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
if "LOOK" in os.environ:
    (folder / f"look-{rank.rank}.json").write_text(json.dumps(looked(trainer)))
trainer.close()
os._exit(0)
