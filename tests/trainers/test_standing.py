"""Where ranks stand, as their logs tell it."""

from pathlib import Path

import pytest

from scalestudy.trainers.standing import Standing, standings, told

# As a rank of torch-ddp writes it that waits for another to train.
WAITING = """\
scalestudy: phase start
oneDNN says hello
scalestudy: phase rendezvous
Thread 0x00007f10 (most recent call first):
  File "/opt/scalestudy/trainers/worker.py", line 332 in _die_with_launcher
  File "/usr/lib/python3.11/threading.py", line 982 in run

Current thread 0x00007f20 (most recent call first):
  File "/usr/lib/python3.11/selectors.py", line 415 in select
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/rendezvous.py", line 189 in _create_c10d_store
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 95 in wrapper
  File "/opt/scalestudy/trainers/torch_ddp.py", line 38 in __init__
  File "/opt/scalestudy/trainers/worker.py", line 166 in _run
"""


def logs(folder: Path, *texts: str) -> Path:
    for rank, text in enumerate(texts):
        (folder / f"rank-{rank}.log").write_text(text, encoding="utf-8")
    return folder


def test_a_place_is_our_innermost_call_and_that_of_the_framework() -> None:
    place = "torch_ddp.py:38 __init__, in torch/distributed/rendezvous.py:189 _create_c10d_store"
    assert told(WAITING) == Standing("rendezvous", place)


@pytest.mark.parametrize(
    "header", ["Thread 0x00007f20 (most recent call first):", "Current thread 0x01 [python] (most recent call first):"]
)
def test_every_form_of_a_stack_is_read(header: str) -> None:
    log = WAITING.replace("Current thread 0x00007f20 (most recent call first):", header)
    assert told(log) == told(WAITING)


def test_the_last_stack_counts() -> None:
    assert told(f"{WAITING}\n{WAITING.replace('38', '39')}").place == told(WAITING.replace("38", "39")).place


def test_an_installed_scalestudy_is_ours_too() -> None:
    path = "/opt/venv/lib/python3.11/site-packages/scalestudy/trainers/"
    assert told(WAITING.replace("/opt/scalestudy/trainers/", path)) == told(WAITING)


def test_python_alone_is_named_where_there_is_nothing_else() -> None:
    assert told('Thread 0x1 (most recent call first):\n  File "/usr/lib/x.py", line 1 in f\n').place == "x.py:1 f"
    assert told("Current thread 0x1 (most recent call first):\n  <no Python frame>\n").place is None


def test_ranks_that_stand_alike_are_told_together_and_who_is_late_last(tmp_path: Path) -> None:
    late = "scalestudy: phase start\nscalestudy: phase import\n"
    folder = logs(tmp_path, WAITING, WAITING, WAITING, late, WAITING, "")
    place = "torch_ddp.py:38 __init__, in torch/distributed/rendezvous.py:189 _create_c10d_store"
    assert standings(folder, 7) == (
        f"ranks 0–2, 4 are in rendezvous ({place}); rank 3 never came there: in import; ranks 5–6 never began"
    )


def test_of_many_ranks_that_all_stand_elsewhere_some_are_told_and_the_last(tmp_path: Path) -> None:
    texts = [WAITING.replace("line 189", f"line {rank}") for rank in range(100)]
    reason = standings(logs(tmp_path, *texts, "scalestudy: phase import\n"), 101)
    assert len(reason) < 700
    assert "\n" not in reason
    assert reason.endswith("97 more stand elsewhere (see their logs); rank 100 never came there: in import")
