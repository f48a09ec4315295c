"""Hand-worked numbers through the whole of the analysis."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scalestudy.analysis import answer, differences, intervals, metrics
from scalestudy.analysis.frames import Frames, frames
from scalestudy.analysis.tables import tables
from scalestudy.trainers.options import DdpOptions
from scalestudy.trainers.record import Record
from scalestudy.trainers.trial import Data, Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]


def analysed(records: list[Record]) -> tuple[Frames, pd.DataFrame, pd.DataFrame]:
    found = frames(records, Path("/nowhere"))
    made = tables(found)
    return found, made.trials, made.points


def sentences_of(points: pd.DataFrame, trials: pd.DataFrame) -> list[tuple[str, list[str]]]:
    [compared] = differences.judged(differences.comparisons(points, trials))
    return answer.headline(points, compared, differences.compilation(points, trials, compared))


def study(
    make_trial: MakeTrial, make_record: MakeRecord, step_s: dict[tuple[str, int], list[float]], **changes: object
) -> list[Record]:
    """Return records of the given step times: a list of repeats for each trainer and world size."""
    return [
        make_record(make_trial(trainer=trainer, world_size=size, repeat=repeat, **changes), seconds)
        for (trainer, size), repeats in step_s.items()
        for repeat, seconds in enumerate(repeats)
    ]


def test_throughput_is_the_global_batch_over_the_slowest_ranks_time(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    _, trials, _ = analysed([make_record(make_trial(world_size=2, per_device_batch=8), [0.1, 0.2])])
    [row] = trials.itertuples()
    # 16 images a step, 0.2 s a step on the slower rank; the 100 s between the windows are not training.
    assert row.throughput_images_per_s == pytest.approx(80)
    assert row.step_time_s == pytest.approx(0.2)


def test_weak_scaling_efficiency(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    _, _, points = analysed(study(make_trial, make_record, {("torch-ddp", 1): [0.1], ("torch-ddp", 4): [0.125]}))
    one, four = points.sort_values("world_size").itertuples()
    assert (one.efficiency, one.speedup) == (1, 1)
    assert four.efficiency == pytest.approx(0.8)
    assert four.speedup == pytest.approx(3.2)
    assert four.reference_world_size == 1


def test_strong_scaling_efficiency(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    records = [
        make_record(make_trial(scaling="strong", world_size=1, per_device_batch=64), 0.4),
        make_record(make_trial(scaling="strong", world_size=4, per_device_batch=16), 0.125),
    ]
    _, _, points = analysed(records)
    four = points[points.world_size == 4].iloc[0]
    # 0.4 s become 0.125 s: 3.2 times as fast on 4 devices.
    assert four.speedup == pytest.approx(3.2)
    assert four.efficiency == pytest.approx(0.8)


def test_the_reference_is_the_smallest_world_size_measured(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    _, _, points = analysed(study(make_trial, make_record, {("torch-ddp", 2): [0.1], ("torch-ddp", 8): [0.2]}))
    eight = points[points.world_size == 8].iloc[0]
    assert eight.reference_world_size == 2
    assert eight.speedup == pytest.approx(2)
    assert eight.efficiency == pytest.approx(0.5)


def test_failed_trials_stay_in_the_results_and_out_of_the_points(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    records = [
        make_record(make_trial(), 0.1),
        make_record(make_trial(repeat=1), 0.1, outcome="failed", reason="x", reports=()),
    ]
    _, trials, points = analysed(records)
    assert points.repeats.tolist() == [1]
    failed = metrics.results(trials).set_index("repeat").loc[1]
    assert failed.outcome == "failed"
    assert pd.isna(failed.throughput_images_per_s)
    assert pd.isna(failed.peak_memory_bytes)


def test_a_study_of_failures_alone_has_empty_points(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    _, trials, points = analysed([make_record(make_trial(), 0.1, outcome="oom", reason="x", reports=())])
    assert points.empty
    assert len(metrics.results(trials)) == 1


def test_medians_and_intervals_over_repeats(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    repeats = {("torch-ddp", 1): [0.1, 0.125, 0.08], ("torch-ddp", 2): [0.2, 0.25, 0.16]}
    _, _, points = analysed(study(make_trial, make_record, repeats))
    one, two = points.sort_values("world_size").itertuples()
    # Three repeats have no narrower interval than their range.
    assert (one.throughput_low, one.throughput_images_per_s, one.throughput_high) == pytest.approx((64, 80, 100))
    assert two.efficiency == pytest.approx(0.5)
    # The reference is as uncertain as the point itself: 64/100 to 100/64 of the ratio.
    assert (two.efficiency_low, two.efficiency_high) == pytest.approx((0.32, 0.78125))
    assert np.isnan(one.efficiency_low)


def test_one_repeat_has_no_interval(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    _, _, points = analysed(study(make_trial, make_record, {("torch-ddp", 1): [0.1], ("torch-ddp", 2): [0.1]}))
    assert points[["throughput_low", "throughput_high", "efficiency_low", "efficiency_high"]].isna().all(axis=None)


DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(1, 0.02, shape),
    "skewed": lambda rng, shape: rng.lognormal(0, 0.5, shape),
    "heavy tails": lambda rng, shape: 1 + 0.02 * rng.standard_t(3, shape),
}


@pytest.mark.parametrize("repeats", [6, 7, 8, 10, 15, 25])
@pytest.mark.parametrize("shape", DRAWS)
def test_intervals_hold_the_true_median_as_often_as_they_say(shape: str, repeats: int) -> None:
    samples = DRAWS[shape](np.random.default_rng(repeats), (2000, repeats))
    low, high = intervals.median_intervals(list(samples))
    assert 0.93 <= np.mean((low <= 1) & (high >= 1)) <= 0.97


@pytest.mark.parametrize("repeats", [6, 10])
def test_intervals_of_a_ratio_hold_it_as_often_as_they_say(repeats: int) -> None:
    above, below = np.random.default_rng(0).normal(1, 0.02, (2, 2000, repeats))
    low, high = intervals.ratio_intervals(list(1.1 * above), list(below))
    assert 0.93 <= np.mean((low <= 1.1) & (high >= 1.1)) <= 0.97


def test_of_ten_repeats_the_interval_lies_between_their_second_and_third_from_either_end() -> None:
    # Hettmansperger & Sheather's own interpolation: 97.85 % are held by the second, 89.06 % by the third.
    part = (0.978516 - 0.95) / (0.978516 - 0.890625)
    share = 8 * part / (2 + 6 * part)
    low, high = intervals.median_intervals([np.arange(1.0, 11.0)])
    assert (low[0], high[0]) == pytest.approx((2 + share, 9 - share), abs=1e-4)


def test_the_range_of_few_repeats_covers_the_median_as_stated() -> None:
    rng = np.random.default_rng(0)
    for repeats in (2, 3, 6):
        draws = rng.normal(size=(20_000, repeats))
        held = np.mean((draws.min(axis=1) <= 0) & (draws.max(axis=1) >= 0))
        assert intervals.coverage(repeats) == pytest.approx(held, abs=0.015)
        others = rng.normal(size=(20_000, repeats))
        overlap = np.mean((draws.min(axis=1) <= others.max(axis=1)) & (draws.max(axis=1) >= others.min(axis=1)))
        assert intervals.ratio_coverage(repeats) == pytest.approx(overlap, abs=0.015)
    assert [intervals.level(intervals.coverage(repeats)) for repeats in (2, 3, 6)] == ["50 %", "75 %", "95 %"]


def test_a_faster_trainer_is_named_with_its_ratio(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    repeats = {("torch-ddp", 1): [0.1] * 6, ("tf-multiworker", 1): [0.2, 0.21, 0.19] * 2}
    _, trials, points = analysed(study(make_trial, make_record, repeats))
    [row] = differences.judged(differences.comparisons(points, trials))[0].itertuples()
    assert (row.faster, row.slower, row.pairs, row.shown) == ("torch-ddp", "tf-multiworker", 6, True)
    assert row.ratio == pytest.approx((2 * 2.1 * 1.9) ** (1 / 3))
    assert row.ratio_low < 2 < row.ratio_high
    [(_, sentences)] = sentences_of(points, trials)
    assert "On 1 device, torch-ddp is 2.00× as fast as tf-multiworker (95 % interval 1.91–2.09×)." in sentences[0]


def test_noise_alone_shows_no_difference(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    repeats = {
        ("torch-ddp", 1): [0.1, 0.12, 0.11, 0.14, 0.12, 0.11],
        ("tf-multiworker", 1): [0.115, 0.11, 0.14, 0.12, 0.13, 0.12],
    }
    _, trials, points = analysed(study(make_trial, make_record, repeats))
    [(_, sentences)] = sentences_of(points, trials)
    assert sentences[0].startswith(
        "On 1 device, no difference is shown between torch-ddp and tf-multiworker: torch-ddp ran 1.05× as fast (95 % "
    )


def test_what_would_be_a_difference_alone_is_said_to_be_none_among_many(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    """A mean log ratio of 0.02 with t = 2.8 of five degrees: p is 0.038 alone, and twice that among two claims."""
    near = (0.1 * np.exp(0.02 + 0.016 * np.array([1, -1, 1, -1, 1, -1]))).tolist()
    step_s = {("torch-ddp", 1): [0.1] * 6, ("tf-multiworker", 1): near}
    for claims, said in ((1, "On 1 device, torch-ddp is 1.02×"), (2, "Alone that would be a difference; among all")):
        if claims == 2:
            step_s |= {("torch-ddp", 2): [0.1, 0.101] * 3, ("tf-multiworker", 2): [0.101, 0.1] * 3}
        _, trials, points = analysed(study(make_trial, make_record, step_s))
        [(_, [sentence, *_])] = sentences_of(points, trials)
        assert said in sentence


@pytest.mark.parametrize(
    ("repeats", "word"), [(1, "one repeat shows"), (2, "two repeats show"), (5, "five repeats show")]
)
def test_few_repeats_show_no_difference_and_no_interval(
    make_trial: MakeTrial, make_record: MakeRecord, repeats: int, word: str
) -> None:
    step_s = {("torch-ddp", 1): [0.1] * repeats, ("tf-multiworker", 1): [0.105] * repeats}
    _, trials, points = analysed(study(make_trial, make_record, step_s))
    [(_, [sentence, *_])] = sentences_of(points, trials)
    assert sentence == (
        f"On 1 device, torch-ddp ran 1.05× as fast as tf-multiworker, but {word} no difference; six can."
    )


def test_trials_of_different_work_are_never_compared(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    records = [
        make_record(make_trial(trainer="torch-ddp", per_device_batch=8), 0.1),
        make_record(make_trial(trainer="tf-multiworker", per_device_batch=16), 0.1),
        make_record(make_trial(trainer="tf-mirrored", per_device_batch=8, threads_per_device=2), 0.1),
    ]
    _, trials, points = analysed(records)
    assert differences.comparisons(points, trials).empty


def test_the_answer_says_where_efficiency_falls(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    repeats = {
        ("torch-ddp", 1): [0.1] * 6,
        ("torch-ddp", 2): [0.11] * 6,
        ("torch-ddp", 4): [0.2] * 6,
        ("tf-multiworker", 1): [0.1] * 6,
        ("tf-multiworker", 2): [0.4] * 6,
    }
    _, trials, points = analysed(study(make_trial, make_record, repeats))
    [(_, sentences)] = sentences_of(points, trials)
    text = " ".join(sentences)
    assert "On 2 devices, torch-ddp is 3.64× as fast as tf-multiworker (95 % interval 3.64–3.64×)." in text
    assert (
        "torch-ddp's efficiency falls below 80% on 4 devices: each device does 50% (95 % interval 50%–50%) of" in text
    )
    assert "tf-multiworker is slower on 2 devices than on 1 device" in text


def test_of_several_series_the_fastest_is_set_against_every_other_in_one_sentence(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    repeats = {
        ("torch-ddp", 1): [0.1] * 6,
        ("horovod-torch", 1): [0.09, 0.12] * 3,
        ("tf-multiworker", 1): [0.2, 0.21] * 3,
        ("horovod-tf", 1): [0.4] * 2,
    }
    _, trials, points = analysed(study(make_trial, make_record, repeats))
    [(_, [sentence, *_])] = sentences_of(points, trials)
    assert sentence == (
        "On 1 device, torch-ddp is 2.05× as fast as tf-multiworker (1.99–2.11×); no difference is shown between "
        "torch-ddp and horovod-torch (1.04×, 0.88–1.23×); torch-ddp ran 4.00× as fast as horovod-tf, but two repeats "
        "show no difference; six can. In brackets 95 % intervals."
    )


def test_what_ran_fastest_too_few_times_hides_no_difference_between_the_others(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    repeats = {("torch-ddp", 1): [0.1] * 6, ("tf-multiworker", 1): [0.2] * 6, ("horovod-tf", 1): [0.05]}
    _, trials, points = analysed(study(make_trial, make_record, repeats))
    [(_, [sentence, *_])] = sentences_of(points, trials)
    assert sentence == (
        "On 1 device, torch-ddp is 2.00× as fast as tf-multiworker (2.00–2.00×); horovod-tf ran 2.00× as fast as "
        "torch-ddp, but one repeat shows no difference; six can. In brackets 95 % intervals."
    )


def in_ways(make_trial: MakeTrial, make_record: MakeRecord) -> list[Record]:
    """Return torch-ddp eagerly, compiled (a fifth faster after 20 s) and with small buckets, six times each."""
    ways: list[tuple[dict[str, object], float, float]] = [
        ({}, 0.1, 0.5),
        ({"execution": "compiled"}, 0.08, 20.5),
        ({"options": DdpOptions(bucket_cap_mb=1)}, 0.2, 0.5),
    ]
    records = []
    for changes, step_s, first_step_s in ways:
        for repeat in range(6):
            record = make_record(make_trial(repeat=repeat, **changes), step_s * (1 + repeat % 3 / 100))
            reports = tuple(
                report.model_copy(update={"phases": report.phases | {"first_step": first_step_s}})
                for report in record.reports
            )
            records.append(record.model_copy(update={"reports": reports}))
    return records


def test_a_trainer_in_another_way_is_a_series_of_its_own_beside_its_usual_one(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    made = tables(frames(in_ways(make_trial, make_record), Path("/nowhere")))
    trials, points = made.trials, made.points
    assert points.series.tolist() == ["torch-ddp compiled", "torch-ddp", "torch-ddp bucket_cap_mb=1"]
    found = made.ways.set_index("series")
    assert set(found.usual) == {"torch-ddp"}
    assert found.ratio.to_dict() == pytest.approx(
        {"torch-ddp": 1, "torch-ddp compiled": 1.25, "torch-ddp bucket_cap_mb=1": 0.5}
    )
    # The slow repeats are slow for both ways alike.
    compiled = found.loc["torch-ddp compiled"]
    assert (compiled.ratio_low, compiled.ratio_high) == pytest.approx((1.25, 1.25))
    assert np.isnan(found.loc["torch-ddp"].ratio_low)
    assert metrics.results(trials).options.unique().tolist() == ["", "bucket_cap_mb=1"]


def test_compiling_has_paid_for_itself_after_as_many_steps_as_its_first_one_took_longer(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    made = tables(frames(in_ways(make_trial, make_record), Path("/nowhere")))
    [row] = made.compilation.itertuples()
    assert (row.series, row.extra_s, row.shown) == ("torch-ddp compiled", 20, True)
    # Medians: 0.101 s eagerly, 0.0808 s compiled; 20 s over 0.0202 s.
    assert row.break_even_steps == pytest.approx(20 / 0.0202)
    assert row.break_even_low < row.break_even_steps < row.break_even_high
    [(_, sentences)] = sentences_of(made.points, made.trials)
    assert sentences[-1].startswith(
        "torch-ddp compiled on 1 device: compiled has paid for its 20 s longer first step after 990 steps"
    )


@pytest.mark.parametrize(
    ("compiled_step_s", "said"),
    [(0.12, "compiled never pays: 120 ms a step against 100 ms"), (0.1, "whether compiled ever pays is not shown")],
)
def test_compiling_that_makes_no_step_shorter_is_not_said_to_pay(
    make_trial: MakeTrial, make_record: MakeRecord, compiled_step_s: float, said: str
) -> None:
    records = [
        make_record(make_trial(execution=execution, repeat=repeat), step_s)
        for execution, step_s in (("eager", 0.1), ("compiled", compiled_step_s))
        for repeat in range(6)
    ]
    _, trials, points = analysed(records)
    [(_, sentences)] = sentences_of(points, trials)
    assert said in sentences[-1]


def test_an_interval_across_the_floor_shows_neither_side(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    repeats = {("torch-ddp", 1): [0.1, 0.1], ("torch-ddp", 2): [0.11, 0.12, 0.15]}
    _, trials, points = analysed(study(make_trial, make_record, repeats))
    [(_, [sentence])] = sentences_of(points, trials)
    assert sentence == (
        "On 2 devices, torch-ddp keeps 83% (67 % interval 67%–91%) of the throughput per device that it has on 1 "
        "device: whether that is below 80% is not shown."
    )


def test_a_reference_measured_once_is_said_to_be_why_there_is_no_interval(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    _, trials, points = analysed(
        study(make_trial, make_record, {("torch-ddp", 1): [0.1], ("torch-ddp", 2): [0.12] * 6})
    )
    [(_, [sentence])] = sentences_of(points, trials)
    assert "keeps 83% (its reference was measured once, no interval)" in sentence


def test_pairs_say_which_is_faster_where_one_has_more_repeats(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    """torch-ddp's last six repeats ran on a faster machine; in the six that both have, it is 5 % slower."""
    repeats = {("torch-ddp", 1): [0.105] * 6 + [0.08] * 6, ("tf-multiworker", 1): [0.1] * 6}
    _, trials, points = analysed(study(make_trial, make_record, repeats))
    [(_, [sentence, *_])] = sentences_of(points, trials)
    assert sentence.startswith("On 1 device, tf-multiworker is 1.05× as fast as torch-ddp")


def test_what_was_measured_after_the_other_is_not_compared(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    records = study(make_trial, make_record, {("torch-ddp", 1): [0.1] * 6, ("tf-multiworker", 1): [0.2] * 6})
    records = [
        record.model_copy(
            update={
                "environment": record.environment.model_copy(
                    update={"started_at": f"2026-01-0{day}T00:0{record.trial.repeat}:00+00:00"}
                )
            }
        )
        for record in records
        for day in [1 if record.trial.trainer == "torch-ddp" else 7]
    ]
    _, trials, points = analysed(records)
    [(_, [sentence, *_])] = sentences_of(points, trials)
    assert sentence == (
        "On 1 device, torch-ddp and tf-multiworker were measured one after the other, not in turns, so they are not "
        "compared."
    )


def test_step_times_are_of_the_slowest_rank_window_by_window(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    found, trials, _ = analysed([make_record(make_trial(world_size=2), [0.1, 0.3])])
    assert found.windows.step_time_s.tolist() == pytest.approx([0.3, 0.3])
    assert metrics.step_time_spread(found.windows, trials).p50_s.tolist() == pytest.approx([0.3])


def test_phases_are_of_the_slowest_rank_and_memory_of_the_fullest(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    found, trials, _ = analysed([make_record(make_trial(world_size=2), 0.1)])
    assert dict(zip(found.phases.phase, found.phases.seconds, strict=True))["import"] == 2.0
    [row] = metrics.results(trials).itertuples()
    assert (row.setup_s, row.first_step_s, row.peak_memory_bytes) == (2.875, 0.125, 1001)


def test_losses_are_the_mean_over_ranks_and_drawn_for_real_data_alone(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    digits = Data(source="digits", channels=1, image_size=32, classes=10)
    found, trials, _ = analysed(
        [make_record(make_trial(world_size=2), 0.1), make_record(make_trial(world_size=2, data=digits), 0.1)]
    )
    curves = metrics.loss_curves(found.losses, trials)
    assert curves.loss.tolist() == [2.0, 1.5]
    assert curves.images.tolist() == [16, 176]


def test_results_have_the_columns_others_rely_on(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    _, trials, _ = analysed([make_record(make_trial(), 0.1)])
    table = metrics.results(trials)
    assert ",".join(table.columns) == (
        "trial,trainer,model,launcher,world_size,nodes,repeat,scaling,per_device_batch,global_batch,precision,"
        "execution,data,outcome,throughput_images_per_s,step_time_s,efficiency,speedup,compute_scaling,load_balance,"
        "waiting,communication,input,unexplained,peak_memory_bytes,energy_j,setup_s,first_step_s,options,device_busy,joules_per_image,"
        "images_per_s_per_w,throttled_s"
    )
    assert (
        table[["compute_scaling", "load_balance", "waiting", "communication", "input", "energy_j"]]
        .isna()
        .all(axis=None)
    )


def test_a_missing_column_is_named_at_the_door() -> None:
    with pytest.raises(ValueError, match="no column measured_steps, measured_s; it has global_batch"):
        metrics.with_throughput(pd.DataFrame({"global_batch": [1]}))


def test_efficiency_surely_above_100_percent_sends_the_reader_to_the_reference(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    """A step of 100 ms alone and of 80 ms on two devices: 1.25 of the reference's throughput per device."""
    steps = {1: 0.1, 2: 0.08, 4: 0.0999}
    step_s = {("torch-ddp", n): [s, s * 1.001, s * 0.999, s * 1.002, s * 0.998, s * 1.0005] for n, s in steps.items()}
    _, trials, points = analysed(study(make_trial, make_record, step_s))
    [said] = [sentence for _, told in sentences_of(points, trials) for sentence in told if "check the" in sentence]
    assert said.startswith("On 2 devices, torch-ddp keeps 1.25× (95 % interval 1.2")
    assert "of the throughput per device that it has on 1 device, above 100 %: check the reference" in said


@pytest.mark.parametrize("repeats", [3, 6])
def test_perfect_scaling_is_not_said_to_be_above_100_percent(
    make_trial: MakeTrial, make_record: MakeRecord, repeats: int
) -> None:
    """Twenty studies of four sizes with 1 % noise: an interval of every point alone would be above 1 in ten of them."""
    rng = np.random.default_rng(1)
    said = 0
    for _ in range(20):
        steps_s = {("torch-ddp", n): (0.1 * np.exp(0.01 * rng.normal(size=repeats))).tolist() for n in (1, 2, 4, 8)}
        _, trials, points = analysed(study(make_trial, make_record, steps_s))
        said += "check the reference" in str(sentences_of(points, trials))
    assert said <= 1


def one_out_of_memory(make_trial: MakeTrial, make_record: MakeRecord) -> list[Record]:
    """Return two equal trainers, of which one has too little memory on one device: 80, 143, 254 and 512 images/s."""
    step_s = {1: 0.1, 2: 0.112, 4: 0.126, 8: 0.125}
    records = study(
        make_trial, make_record, {(name, n): [s] for name in ("torch-ddp", "tf-mirrored") for n, s in step_s.items()}
    )
    small = make_trial(trainer="tf-mirrored", world_size=1)
    records = [record for record in records if record.trial.id != small.id]
    return [*records, make_record(small, outcome="oom", reason="no memory", reports=())]


def test_equal_trainers_have_equal_speedups_though_one_has_no_memory_on_one_device(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    made = tables(frames(one_out_of_memory(make_trial, make_record), Path("/nowhere")))
    by = made.points.set_index(["series", "world_size"])
    assert (by.reference_world_size == 2).all()
    # 8 images a device: 4 times the devices at 0.112 of 0.125 of the speed each.
    assert by.speedup["torch-ddp", 8] == by.speedup["tf-mirrored", 8] == pytest.approx(4 * 0.112 / 0.125)
    # A size below the reference stands against it, too: one device does 0.112 of 0.1 of what each of two does.
    assert by.efficiency["torch-ddp", 1] == pytest.approx(1.12)
    assert by.speedup["torch-ddp", 1] == pytest.approx(0.56)
    [said] = made.unlike
    assert said.endswith(
        "efficiency and speedup stand against 2 devices, the smallest size that all trainers measured: tf-mirrored ran "
        "out of memory on 1 device."
    )
    [(_, sentences)] = answer.headline(made.points, made.comparisons, made.compilation)
    [kept] = [one for one in sentences if "torch-ddp keeps" in one]
    assert kept.startswith("On 8 devices, ")
    assert "of the throughput per device that it has on 2 devices" in kept


def test_trainers_that_share_no_size_have_references_of_their_own(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    made = tables(
        frames(
            study(
                make_trial,
                make_record,
                {("torch-ddp", n): [0.1] for n in (1, 2)} | {("tf-mirrored", n): [0.1] for n in (2, 4)},
            ),
            Path("/nowhere"),
        )
    )
    assert dict(made.points.groupby("series").reference_world_size.first()) == {"torch-ddp": 1, "tf-mirrored": 2}
    [said] = made.unlike
    assert "tf-mirrored against 2 devices, torch-ddp against 1 device" in said


def test_a_trainer_measured_on_one_size_moves_no_reference(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    steps = {("torch-ddp", n): [0.1] for n in (1, 2, 4)} | {("tf-mirrored", 4): [0.1]}
    made = tables(frames(study(make_trial, make_record, steps), Path("/nowhere")))
    assert dict(made.points.groupby("series").reference_world_size.first()) == {"torch-ddp": 1, "tf-mirrored": 4}
    assert made.unlike == []


def test_headings_name_launcher_and_device_where_they_differ(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    record = make_record(make_trial())
    on_slurm = record.environment.model_copy(update={"launcher": "slurm"})
    alone = tables(frames([record], Path("/nowhere")))
    two = tables(frames([record, make_record(make_trial(repeat=1), environment=on_slurm)], Path("/nowhere")))
    endings = [
        [
            heading.partition(" scaling")[2]
            for heading, _ in answer.headline(made.points, made.comparisons, made.compilation)
        ]
        for made in (alone, two)
    ]
    assert endings == [[""], [", launched by local", ", launched by slurm"]]
    mixed = pd.DataFrame([("x", "weak", device, "local") for device in ("cpu", "gpu")], columns=metrics.WORK)
    assert list(metrics.headings(mixed).values()) == ["x, weak scaling, on CPUs", "x, weak scaling, on GPUs"]
