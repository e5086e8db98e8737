"""Metrics of continual learning, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from clext import metrics

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
