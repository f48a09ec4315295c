"""A file of ours that is torn, newer or inconsistent says so in one line; one that is missing is another thing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.trainers.files import RECORD_NAME, DamagedError, read_ours, read_record
from scalestudy.trainers.record import Collective, RankReport, Record, Window, flaw
from scalestudy.trainers.trial import Sweep, Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]


def reason(path: Path, content: str | bytes) -> str:
    """Return why a record is refused."""
    file = path / RECORD_NAME
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DamagedError) as caught:
        read_record(path)
    assert str(caught.value) == f"{file}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_what_is_wrong_with_a_record_is_named(tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord) -> None:
    whole = make_record(make_trial()).model_dump_json(by_alias=True)
    fields = json.loads(whole)
    assert reason(tmp_path, whole[:100]).startswith("is torn: 100 bytes, EOF while parsing")
    assert reason(tmp_path, "").startswith("is torn: 0 bytes")
    assert reason(tmp_path, b"\xff\xfe").startswith("is torn: 2 bytes")
    assert reason(tmp_path, "[" * 100_000).startswith("is torn")
    newer = "is of schema 7, which a newer scalestudy wrote; this one reads schema 1"
    assert reason(tmp_path, json.dumps(fields | {"schema": 7, "more": 1})) == newer
    assert "a field that this version does not know, more: a newer" in reason(
        tmp_path, json.dumps(fields | {"more": 1})
    )
    assert reason(tmp_path, json.dumps(fields | {"outcome": "fine"})).startswith("is damaged: outcome: Input should be")
    assert reason(tmp_path, "null").startswith("is damaged: ")
    (tmp_path / RECORD_NAME).unlink()
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)
    (tmp_path / RECORD_NAME).mkdir()
    with pytest.raises(DamagedError, match="cannot be read: Is a directory"):
        read_record(tmp_path)


def test_a_report_without_a_schema_is_read_alike(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text('{"schema": 9}')
    with pytest.raises(DamagedError, match=r"rank-0\.json: is damaged: rank: Field required, and 1 mistakes more"):
        read_ours(tmp_path / "rank-0.json", RankReport)


def test_an_ok_trial_whose_reports_do_not_fit_together_is_damaged(
    tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    record = make_record(make_trial(world_size=2))
    zero, one = record.reports
    assert flaw(record.trial, record.reports) is None
    nothing = one.model_copy(update={"windows": ()})
    halved = one.model_copy(update={"windows": one.windows[:1]})
    backwards = one.model_copy(update={"windows": (Window(5.0, 1.0, 5), Window(5.0, 9.0, 5))})
    forgetful = one.model_copy(update={"losses": ()})
    assert flaw(record.trial, ()) == "no rank reported"
    assert flaw(record.trial, (zero, zero)) == "the reports are of ranks 0, 0"
    assert flaw(record.trial, (zero, nothing)) == "a rank timed no window"
    assert flaw(record.trial, (zero, halved)) == "the ranks timed different windows"
    assert flaw(record.trial, (zero, backwards)) == "rank 1 reported a window of 5 steps from 5.0 to 1.0"
    same_gpu = [
        report.model_copy(update={"rank": report.rank.model_copy(update={"devices": (3,)})}) for report in (zero, one)
    ]
    assert flaw(record.trial, same_gpu) == "2 ranks of node 0 took its GPU 3"
    assert flaw(record.trial, (zero, forgetful)) == "the ranks kept different numbers of losses or steps"
    torn = record.model_copy(update={"reports": (zero, halved)}).model_dump_json(by_alias=True)
    assert reason(tmp_path, torn) == "is damaged: the ranks timed different windows"


def test_of_a_sweep_every_rank_timed_the_same_sizes(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    zero, one = make_record(make_trial(world_size=2)).reports
    trial = make_trial(world_size=2, sweep=Sweep())
    timed = (Collective(1024, (Window(0.0, 1.0, 1),)), Collective(2048, (Window(0.0, 1.0, 1),)))
    whole, part = (one.model_copy(update={"collectives": found}) for found in (timed, timed[:1]))
    first = zero.model_copy(update={"collectives": timed})
    assert flaw(trial, (first, whole)) is None
    for other in (part, one):
        assert flaw(trial, (first, other)) == "the ranks did not time the same sizes"
    assert flaw(trial, (zero, one)) == "the ranks did not time the same sizes"
