"""Who Horovod is told a rank is, for any way of laying ranks out on nodes."""

from collections.abc import Callable

import pytest

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.horovod_rendezvous import check_build, variables
from scalestudy.trainers.options import HorovodOptions
from scalestudy.trainers.trial import Trial

ENVIRON = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}


def rank_of(rank: int, world_size: int, per_node: int) -> Rank:
    node = rank // per_node
    return Rank(
        rank=rank,
        world_size=world_size,
        local_rank=rank % per_node,
        local_world_size=min(per_node, world_size - node * per_node),
        node_rank=node,
        host="host",
    )


@pytest.mark.parametrize(("world_size", "per_node"), [(1, 4), (2, 2), (4, 1), (8, 4), (5, 2), (7, 3)])
def test_cross_ranks_count_the_nodes_that_have_a_local_rank(world_size: int, per_node: int) -> None:
    ranks = [rank_of(rank, world_size, per_node) for rank in range(world_size)]
    for rank in ranks:
        told = variables(rank, HorovodOptions(), ENVIRON)
        peers = [peer for peer in ranks if peer.local_rank == rank.local_rank]
        assert int(told["HOROVOD_CROSS_SIZE"]) == len(peers)
        assert int(told["HOROVOD_CROSS_RANK"]) == peers.index(rank)
        assert told["HOROVOD_HOSTNAME"] == f"host-{rank.node_rank}"
        assert int(told["HOROVOD_LOCAL_SIZE"]) == sum(peer.node_rank == rank.node_rank for peer in ranks)


def test_options_are_horovods_variables_in_its_units() -> None:
    options = HorovodOptions(fusion_threshold_mb=0.5, cycle_time_ms=3.5, autotune=True)
    told = variables(rank_of(0, 1, 1), options, ENVIRON)
    assert told["HOROVOD_FUSION_THRESHOLD"] == "524288"
    assert (told["HOROVOD_CYCLE_TIME"], told["HOROVOD_AUTOTUNE"]) == ("3.5", "1")
    assert (told["HOROVOD_GLOO_IFACE"], told["HOROVOD_GLOO_RENDEZVOUS_ADDR"]) == ("eth0", "10.0.0.1")


def test_a_build_that_lacks_what_a_trial_asks_for_is_refused(make_trial: Callable[..., Trial]) -> None:
    gpu = make_trial(trainer="horovod-torch", device="gpu")
    check_build(gpu, mpi=False, nccl=True)
    with pytest.raises(ValueError, match="built without NCCL"):
        check_build(gpu, mpi=True, nccl=False)
    asked = make_trial(trainer="horovod-tf", device="gpu", options=HorovodOptions(hierarchical_allreduce=True))
    with pytest.raises(ValueError, match=r"options.horovod-tf.hierarchical_allreduce: true, but .* without MPI"):
        check_build(asked, mpi=False, nccl=True)


def test_what_the_study_does_not_name_is_horovods_own_business() -> None:
    """Horovod's autotuning leaves alone what a variable has set, even to the default."""
    told = variables(rank_of(0, 1, 1), HorovodOptions(autotune=True), ENVIRON)
    assert {"HOROVOD_FUSION_THRESHOLD", "HOROVOD_CYCLE_TIME", "HOROVOD_HIERARCHICAL_ALLREDUCE"}.isdisjoint(told)
    assert "HOROVOD_AUTOTUNE" not in variables(rank_of(0, 1, 1), HorovodOptions(), ENVIRON)
