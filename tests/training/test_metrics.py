"""Metrics of continual learning, against numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from clext.training import metrics

NAN = math.nan
# Task 0 was best after task 1, so that forgetting and backward transfer differ.
ACCURACY = np.array([[0.8, NAN, NAN], [0.9, 0.7, NAN], [0.5, 0.6, 0.95]])
UNFINISHED = np.array([[0.8, NAN, NAN], [0.9, 0.7, NAN], [NAN, NAN, NAN]])
JOINT = np.array([[0.8, NAN, NAN], [0.85, 0.9, NAN], [0.9, 0.9, 0.9]])


def test_average_accuracy_is_over_the_tasks_seen():
    assert metrics.average_accuracy(ACCURACY) == pytest.approx([0.8, 0.8, (0.5 + 0.6 + 0.95) / 3])


def test_forgetting_is_from_the_best_accuracy_before_the_last_task():
    assert metrics.forgetting(ACCURACY) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)


def test_backward_transfer_is_from_the_accuracy_just_after_learning():
    assert metrics.backward_transfer(ACCURACY) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)


def test_forward_transfer_is_the_gain_over_the_untrained_model_on_later_tasks():
    before = np.array([0.1, 0.3, 0.25])  # the first has no task before it
    untrained = np.array([0.1, 0.2, 0.3])
    expected = ((0.3 - 0.2) + (0.25 - 0.3)) / 2
    assert metrics.forward_transfer(before, untrained) == pytest.approx(expected)
    before[2] = NAN  # not begun
    assert metrics.forward_transfer(before, untrained) == pytest.approx(0.1)


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert metrics.learning_accuracy(ACCURACY) == pytest.approx((0.8 + 0.7 + 0.95) / 3)


def test_intransigence_is_what_joint_does_better_on_the_newest_task():
    # The first task is all the data there is, so that both learn the same.
    expected = [0.8 - 0.8, 0.9 - 0.7, 0.9 - 0.95]
    assert metrics.intransigence(ACCURACY, JOINT) == pytest.approx(expected)


def test_the_worst_accuracy_is_the_lowest_after_each_earlier_task():
    # Task 0 after tasks 1 and 2: 0.9, 0.5. Task 1 after task 2: 0.6. Just after learning, 0.8
    # and 0.7, does not count, nor does the last task.
    assert metrics.worst_accuracy(ACCURACY) == pytest.approx((0.5 + 0.6) / 2)
    steps: list[metrics.Step] = [
        {"task": 0, "step": 5, "accuracy": [0.01]},  # task 0 itself is being learned
        {"task": 1, "step": 5, "accuracy": [0.3, 0.02]},
        {"task": 2, "step": 5, "accuracy": [0.6, 0.65, 0.03]},
    ]
    assert metrics.worst_accuracy(ACCURACY, steps) == pytest.approx((0.3 + 0.6) / 2)


def test_an_unfinished_run_is_measured_as_far_as_it_went():
    assert metrics.tasks_learned(UNFINISHED) == 2
    assert metrics.average_accuracy(UNFINISHED) == pytest.approx([0.8, 0.8])
    assert metrics.forgetting(UNFINISHED) == pytest.approx(-0.1)  # the task got better
    assert metrics.backward_transfer(UNFINISHED) == pytest.approx(0.1)
    assert metrics.learning_accuracy(UNFINISHED) == pytest.approx((0.8 + 0.7) / 2)
    missed = metrics.intransigence(UNFINISHED, JOINT)
    assert missed[:2] == pytest.approx([0.0, 0.2])
    assert math.isnan(missed[2])
    begun: list[metrics.Step] = [{"task": 1, "step": 5, "accuracy": [0.7, 0.2]}]
    first = np.array([[0.8, NAN], [NAN, NAN]])
    assert metrics.worst_accuracy(first, begun) == pytest.approx(0.7)


def test_the_interval_is_students():
    values = [0.81, 0.85, 0.79, 0.9]
    mean, std, low, high = metrics.summary([*values, NAN])
    assert (mean, std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    interval = stats.t.interval(0.95, df=3, loc=mean, scale=stats.sem(values))
    assert (low, high) == pytest.approx(interval)
    assert metrics.summary([0.5])[0] == 0.5
    for known in ([], [0.5]):
        assert np.isnan(metrics.summary(known)[1:]).all()


@pytest.mark.parametrize("accuracy", [np.full((2, 2), NAN), np.array([[0.8]])])
def test_with_fewer_than_two_tasks_nothing_can_be_forgotten(accuracy):
    assert math.isnan(metrics.forgetting(accuracy))
    assert math.isnan(metrics.backward_transfer(accuracy))
    assert math.isnan(metrics.worst_accuracy(accuracy))
    assert math.isnan(metrics.forward_transfer(np.diagonal(accuracy), np.full(len(accuracy), 0.1)))
    assert math.isnan(metrics.learning_accuracy(accuracy)) == math.isnan(accuracy[0, 0])
