"""Which devices a trial takes in each of its repeats: tables worked by hand, and what holds for all nodes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalestudy.cluster.rotation import rotated


@pytest.mark.parametrize(
    ("count", "by_turn"),
    [
        (1, ["0", "1", "2", "3", "4", "5", "6", "7", "0"]),
        (2, ["01", "23", "45", "67", "01", "23", "45", "67", "01"]),
        (4, ["0123", "4567", "0123", "4567", "0123", "4567", "0123", "4567", "0123"]),
        (8, ["01234567"] * 9),
        # Three stay within a half of the node, and leave out another of its four each time they come back.
        (3, ["012", "456", "123", "567", "023", "467", "013", "457", "012"]),
        (6, ["012345", "123456", "234567", "034567", "014567", "012567", "012367", "012347", "012345"]),
    ],
)
def test_of_eight_devices_every_repeat_takes_the_next_ones(count: int, by_turn: list[str]) -> None:
    assert ["".join(map(str, rotated(turn, count, 8))) for turn in range(9)] == by_turn


def test_where_a_trial_uses_all_devices_there_is_nothing_to_rotate() -> None:
    assert [rotated(turn, 2, 2) for turn in range(3)] == [[0, 1]] * 3
    # Fewer, or none, are known of.
    assert [rotated(turn, 2, there) for turn in range(3) for there in (0, 1)] == [[0, 1]] * 6


@given(st.integers(1, 16), st.integers(1, 16), st.integers(0, 20))
def test_on_whatever_node_a_trial_has_different_devices_and_each_has_its_turn(
    there: int, count: int, turn: int
) -> None:
    count = min(count, there)
    taken = rotated(turn, count, there)
    assert len(set(taken)) == count
    assert taken == sorted(taken)
    assert set(taken) <= set(range(there))
    assert rotated(0, count, there) == list(range(count))
    turns = Counter(device for turn in range(there) for device in rotated(turn, count, there))
    if there % count == 0:
        assert set(turns.values()) == {count}
    assert set(turns) == set(range(there))
