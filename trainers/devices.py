"""Which of its node's devices a rank drives; CPUs, which are no numbered devices, follow in `pinning`."""

from collections.abc import Sequence

from scalestudy.cluster.rank import Rank
from scalestudy.cluster.rotation import rotated
from scalestudy.trainers.trial import Trial


def turn(trial: Trial) -> int:
    """Return how often the node's devices have been rotated: by repeat, or never."""
    return trial.repeat if trial.rotate_devices else 0


def local_places(trial: Trial, rank: Rank) -> range:
    """Return which of the devices that the trial uses on the rank's node are the rank's, counted from 0."""
    count = trial.world_size // rank.world_size
    return range(rank.local_rank * count, (rank.local_rank + 1) * count)


def settled(trial: Trial, rank: Rank, gpus: int) -> Rank:
    """Return the rank with the GPUs that it drives, of so many that CUDA shows there; 0 where nobody can say.

    On CPU the rank is what it was.
    """
    if trial.device == "cpu":
        return rank
    places = local_places(trial, rank)
    devices = rotated(turn(trial), rank.local_world_size * len(places), gpus)
    return rank.model_copy(update={"devices": tuple(devices[place] for place in places)})


def own_devices(trial: Trial, rank: Rank) -> Sequence[int]:
    """Return the GPUs that a rank drives, as CUDA numbers them; where they are not settled, those of its local rank."""
    return rank.devices or local_places(trial, rank)
