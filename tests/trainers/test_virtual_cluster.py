"""benchmarks/virtual_cluster.py, whose truth other tests believe: worked by hand."""

from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import norm
from virtual_cluster import Cluster, Truth, VirtualTrainer, measured, record, records

from scalestudy.trainers.record import Record
from scalestudy.trainers.trial import Measurement

PLAN = Measurement(window_s=0.5, windows=10)


def steps_s(trainer: VirtualTrainer, count: int) -> list[float]:
    """Return how long each of so many steps took the slowest rank."""
    ends_s = [trainer.times_s.max()]
    for _ in range(count):
        trainer.step()
        ends_s.append(trainer.times_s.max())
    return [float(step_s) for step_s in np.diff(ends_s).round(9)]


def test_a_step_takes_the_slower_rank_and_what_is_exposed_of_the_exchange() -> None:
    trainer = VirtualTrainer(Cluster(ranks=2, step_s=0.1, slowdown=(1.0, 1.2), exchange_s=0.04, hidden=0.25))
    assert steps_s(trainer, 3) == [0.15, 0.15, 0.15]


def test_a_rank_alone_waits_for_nobody() -> None:
    trainer = VirtualTrainer(Cluster(ranks=2, step_s=0.1, slowdown=(1.0, 1.2), exchange_s=0.04))
    trainer.local_step()
    assert trainer.times_s.tolist() == pytest.approx([0.1, 0.12])
    assert trainer.max_over_ranks(np.array([3.0, 2.0])) == 3.0
    assert trainer.times_s.tolist() == pytest.approx([0.12, 0.12])
    trainer.exchange_step()
    assert trainer.times_s.tolist() == pytest.approx([0.16, 0.16])


def test_one_device_exchanges_nothing() -> None:
    assert steps_s(VirtualTrainer(Cluster(ranks=1, step_s=0.1, exchange_s=0.04)), 1) == [0.1]


def test_steps_run_from_a_full_queue_until_it_is_empty() -> None:
    # Sixteen lie ready and one more is made every 200 ms: step k begins at 100 k ms, and batch 16 + j is ready at
    # 200 (j + 1) ms. So batch 31 is the first to be waited for, and from then on every batch is.
    trainer = VirtualTrainer(Cluster(ranks=1, step_s=0.1, batch_period_s=0.2, queue=16))
    for _ in range(32):
        trainer.resident_step()
    assert steps_s(trainer, 34) == [0.1] * 31 + [0.2] * 3


def test_workers_in_step_give_their_batches_at_once() -> None:
    # Four workers take 400 ms a batch each: four lie ready at 400 ms, the next four at 800.
    trainer = VirtualTrainer(Cluster(ranks=1, step_s=0.05, batch_period_s=0.1, queue=8, workers=4))
    assert steps_s(trainer, 9) == [0.45, 0.05, 0.05, 0.05, 0.25, 0.05, 0.05, 0.05, 0.25]


@pytest.mark.parametrize(("period_s", "expected_s"), [(0.08, 0.1), (0.09, 0.1), (0.11, 0.11)])
@pytest.mark.parametrize("queue", [2, 16])
def test_workers_in_step_cost_no_more_than_one_in_the_long_run(queue: int, period_s: float, expected_s: float) -> None:
    cluster = Cluster(ranks=2, step_s=0.1, batch_period_s=period_s, queue=queue, workers=queue // 2)
    assert cluster.whole_s() == pytest.approx(expected_s)
    assert np.mean(steps_s(VirtualTrainer(cluster), 2000)) == pytest.approx(expected_s, rel=0.01)


def test_of_more_workers_than_their_queue_holds_the_rest_would_idle() -> None:
    with pytest.raises(ValueError, match="4 workers, of whose batches the queue holds 2"):
        Cluster(ranks=1, batch_period_s=0.1, queue=2, workers=4)


def test_without_a_queue_a_step_makes_its_own_batch() -> None:
    trainer = VirtualTrainer(Cluster(ranks=1, step_s=0.1, batch_period_s=0.2, queue=0))
    for _ in range(32):
        trainer.resident_step()
    assert steps_s(trainer, 2) == [0.3, 0.3]


def test_producers_stop_where_the_queue_is_full() -> None:
    trainer = VirtualTrainer(Cluster(ranks=1, step_s=0.1, batch_period_s=0.2, queue=2))
    for _ in range(100):
        trainer.resident_step()
    began_s = trainer.times_s.max()
    for _ in range(4):
        trainer.next_batch()
    # Two lay there, and as the first was taken the third was begun.
    assert trainer.times_s.max() - began_s == pytest.approx(0.4)


def test_a_drift_ends_with_its_time_constant() -> None:
    found = steps_s(VirtualTrainer(Cluster(ranks=1, step_s=0.1, drift=0.3, drift_tau_s=10)), 2000)
    assert found[0] == 0.13
    # After 10 s 0.3 / e is left of it.
    after = int(np.searchsorted(np.cumsum(found), 10.0))
    assert found[after + 1] == pytest.approx(0.1 * (1 + 0.3 / np.e), rel=0.001)
    assert found[-1] == pytest.approx(0.1, rel=1e-6)


def test_common_jitter_is_the_same_on_all_ranks_and_costs_nothing_at_scale() -> None:
    cluster = Cluster(ranks=64, common_jitter=0.05)
    trainer = VirtualTrainer(cluster)
    trainer.local_step()
    assert np.ptp(trainer.times_s) == 0
    assert cluster.slowest_s() == 0.1


def test_the_expected_slowest_of_ranks_that_jitter_is_that_of_a_long_run() -> None:
    cluster = Cluster(ranks=64, jitter=0.05, slowdown=[1.0] * 63 + [1.1], blip_s=0.05, blip_probability=0.001)
    assert cluster.slowest_s() == pytest.approx(np.mean(steps_s(VirtualTrainer(cluster), 4000)), rel=0.003)


def test_the_expected_slowest_of_two_uses_the_known_formula() -> None:
    # Of two independent lognormals of mean 1: 2 Φ(σ / √2).
    assert Cluster(ranks=2, step_s=1.0, jitter=0.2).slowest_s() == pytest.approx(
        2 * norm.cdf(0.2 / np.sqrt(2)), rel=1e-4
    )


def test_the_truth_is_a_factor_for_every_cause() -> None:
    reference = Cluster(ranks=1, step_s=0.1, batch_period_s=0.11, queue=16)
    # 110 ms a step at the reference, all of it input; ours: 125 ms typical, 150 ms the slowest, 30 ms exposed, 240 ms.
    cluster = Cluster(
        ranks=4, step_s=0.125, slowdown=(1, 1, 1, 1.2), exchange_s=0.06, hidden=0.5, batch_period_s=0.24, queue=16
    )
    truth = cluster.truth(reference)
    expected = Truth(
        compute_scaling=0.8,
        load_balance=1 / 1.2,
        waiting=1.0,
        communication=150 / 180,
        input=(180 / 240) / (100 / 110),
    )
    assert astuple(truth) == pytest.approx(astuple(expected))
    assert truth.efficiency == pytest.approx(110 / 240)


def test_a_long_training_with_a_short_queue_waits_for_more_than_the_slower_of_the_two() -> None:
    cluster = Cluster(ranks=1, step_s=0.1, jitter=0.3, batch_period_s=0.1, queue=1)
    assert cluster.whole_s() > 1.05 * 0.1
    longer = Cluster(ranks=1, step_s=0.1, jitter=0.3, batch_period_s=0.1, queue=256)
    assert cluster.whole_s() > longer.whole_s() > 0.099


def test_the_real_loop_measures_every_rank() -> None:
    seen, causes = measured(Cluster(ranks=2, step_s=0.1, slowdown=(1.0, 1.2), exchange_s=0.03), PLAN)
    window = seen.windows[-1]
    assert len(seen.windows) == 10
    assert np.asarray(window.end_s - window.start_s) == pytest.approx(np.array([0.15, 0.15]) * window.steps)
    alone = causes.local[-1]
    assert np.asarray(alone.end_s - alone.start_s) == pytest.approx(np.array([0.1, 0.12]) * alone.steps)


def test_records_are_valid_and_hold_every_ranks_own_times() -> None:
    found = record(Cluster(ranks=10, step_s=0.1, slowdown=[1.0] * 9 + [1.2], exchange_s=0.03, batch_period_s=0.02), 3)
    again = Record.model_validate_json(found.model_dump_json(by_alias=True))
    assert again == found
    assert again.throughput_images_per_s == pytest.approx(640 / 0.17)
    assert again.trial.repeat == 3
    first, last = again.reports[0], again.reports[-1]
    assert (last.rank.rank, last.rank.node_rank, last.rank.local_rank, last.rank.local_world_size) == (9, 1, 1, 2)
    local_s = [report.local_windows[0].end_s - report.local_windows[0].start_s for report in (first, last)]
    assert local_s[1] / local_s[0] == pytest.approx(1.2)
    assert last.whole_windows
    assert len(last.local_step_times_s) == len(first.local_step_times_s) > 0


def test_a_study_has_every_point_as_often_as_asked_and_by_its_seed_alone() -> None:
    clusters = [Cluster(ranks=ranks, jitter=0.05, repeat_jitter=0.01) for ranks in (1, 2)]
    plan = Measurement(window_s=0.2, windows=3, warm_up_max_s=1)
    found = records(clusters, 3, plan)
    assert [(one.trial.world_size, one.trial.repeat) for one in found] == [
        (ranks, repeat) for repeat in range(3) for ranks in (1, 2)
    ]
    assert len({one.throughput_images_per_s for one in found}) == 6
    assert records(clusters, 3, plan) == found
