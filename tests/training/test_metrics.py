"""Metrics of continual learning, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from clext.training import metrics

NAN = math.nan
# Task 0 was best after task 1, so that forgetting and backward transfer differ.
ACCURACY = np.array([[0.8, NAN, NAN], [0.9, 0.7, NAN], [0.5, 0.6, 0.95]])


def test_average_accuracy_is_over_the_tasks_seen():
    assert metrics.average_accuracy(ACCURACY) == pytest.approx([0.8, 0.8, (0.5 + 0.6 + 0.95) / 3])


def test_forgetting_is_from_the_best_accuracy_before_the_last_task():
    assert metrics.forgetting(ACCURACY) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)


def test_backward_transfer_is_from_the_accuracy_just_after_learning():
    assert metrics.backward_transfer(ACCURACY) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)


def test_tasks_that_got_better_have_negative_forgetting():
    accuracy = np.array([[0.8, NAN], [0.9, 0.7]])
    assert metrics.forgetting(accuracy) == pytest.approx(-0.1)
    assert metrics.backward_transfer(accuracy) == pytest.approx(0.1)


def test_an_unfinished_run_is_measured_up_to_its_last_task():
    accuracy = ACCURACY.copy()
    accuracy[2] = NAN
    assert metrics.tasks_learned(accuracy) == 2
    assert metrics.average_accuracy(accuracy) == pytest.approx([0.8, 0.8])
    assert metrics.forgetting(accuracy) == pytest.approx(-0.1)


@pytest.mark.parametrize("accuracy", [np.full((2, 2), NAN), np.array([[0.8]])])
def test_with_fewer_than_two_tasks_nothing_can_be_forgotten(accuracy):
    assert math.isnan(metrics.forgetting(accuracy))
    assert math.isnan(metrics.backward_transfer(accuracy))


class TestForwardTransfer:
    def test_is_the_gain_over_the_untrained_model_on_later_tasks(self):
        before = np.array([0.1, 0.3, 0.25])  # the first has no task before it
        untrained = np.array([0.1, 0.2, 0.3])
        expected = ((0.3 - 0.2) + (0.25 - 0.3)) / 2
        assert metrics.forward_transfer(before, untrained) == pytest.approx(expected)

    def test_tasks_that_were_not_begun_are_left_out(self):
        before, untrained = np.array([0.1, 0.3, NAN]), np.array([0.1, 0.2, 0.3])
        assert metrics.forward_transfer(before, untrained) == pytest.approx(0.1)

    @pytest.mark.parametrize("before", [[0.5], [0.5, NAN], [NAN, NAN]])
    def test_needs_a_second_task(self, before):
        untrained = np.full(len(before), 0.1)
        assert math.isnan(metrics.forward_transfer(np.array(before), untrained))


class TestLearningAccuracy:
    def test_is_the_mean_of_the_diagonal(self):
        assert metrics.learning_accuracy(ACCURACY) == pytest.approx((0.8 + 0.7 + 0.95) / 3)

    def test_counts_what_was_learned(self):
        accuracy = ACCURACY.copy()
        accuracy[2] = NAN
        assert metrics.learning_accuracy(accuracy) == pytest.approx((0.8 + 0.7) / 2)
        assert math.isnan(metrics.learning_accuracy(np.full((2, 2), NAN)))


class TestIntransigence:
    JOINT = np.array([[0.8, NAN, NAN], [0.85, 0.9, NAN], [0.9, 0.9, 0.9]])

    def test_is_what_joint_does_better_on_the_newest_task(self):
        # The first task is all the data there is, so that both learn the same.
        expected = [0.8 - 0.8, 0.9 - 0.7, 0.9 - 0.95]
        assert metrics.intransigence(ACCURACY, self.JOINT) == pytest.approx(expected)

    def test_is_unknown_for_tasks_that_were_not_reached(self):
        accuracy = ACCURACY.copy()
        accuracy[2] = NAN
        found = metrics.intransigence(accuracy, self.JOINT)
        assert found[:2] == pytest.approx([0.0, 0.2])
        assert math.isnan(found[2])


class TestWorstAccuracy:
    def test_is_the_lowest_after_each_earlier_task(self):
        # Task 0 after tasks 1 and 2: 0.9, 0.5. Task 1 after task 2: 0.6. Just after learning, 0.8
        # and 0.7, does not count, nor does the last task.
        assert metrics.worst_accuracy(ACCURACY) == pytest.approx((0.5 + 0.6) / 2)

    def test_the_gap_within_a_task_counts(self):
        steps: list[metrics.Step] = [
            {"task": 0, "step": 5, "accuracy": [0.01]},  # task 0 itself is being learned
            {"task": 1, "step": 5, "accuracy": [0.3, 0.02]},
            {"task": 2, "step": 5, "accuracy": [0.6, 0.65, 0.03]},
        ]
        assert metrics.worst_accuracy(ACCURACY, steps) == pytest.approx((0.3 + 0.6) / 2)

    def test_an_interrupted_task_counts_as_far_as_it_went(self):
        accuracy = np.array([[0.8, NAN], [NAN, NAN]])
        assert math.isnan(metrics.worst_accuracy(accuracy))
        steps: list[metrics.Step] = [{"task": 1, "step": 5, "accuracy": [0.7, 0.2]}]
        assert metrics.worst_accuracy(accuracy, steps) == pytest.approx(0.7)
