import json

import pytest

from scalestudy.cluster.rank import Rank, rank_environ

RANK = Rank(rank=1, world_size=2, local_rank=1, local_world_size=2, node_rank=0, host="here")


def test_a_rank_reads_back_what_its_launcher_wrote() -> None:
    assert Rank.from_environ(rank_environ(RANK, ["a:1", "b:2"])) == RANK


def test_both_frameworks_are_told_the_same_addresses() -> None:
    environ = rank_environ(RANK, ["a:1", "b:2"])
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("a", "1")
    assert json.loads(environ["TF_CONFIG"]) == {
        "cluster": {"worker": ["a:1", "b:2"]},
        "task": {"type": "worker", "index": 1},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "one"}, "RANK='one' is not a number"),
        ({"RANK": "2"}, "RANK=2 is not in 0..WORLD_SIZE-1"),
    ],
)
def test_a_wrong_variable_is_named(change: dict[str, str | None], message: str) -> None:
    environ = {**rank_environ(RANK, ["a:1", "b:2"]), **change}
    with pytest.raises(ValueError, match=message):
        Rank.from_environ({name: value for name, value in environ.items() if value is not None})


def test_every_rank_needs_an_address() -> None:
    with pytest.raises(ValueError, match="2 ranks need as many addresses, got 1"):
        rank_environ(RANK, ["a:1"])
