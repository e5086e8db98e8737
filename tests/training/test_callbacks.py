"""Callbacks: when they are called, what they see, and how they end a run."""

import pytest
import torch
from quick_runs import QUICK, same, small, weights

import clext


class Record(clext.Callback):
    def __init__(self):
        self.calls = []

    def on_begin(self, training):
        self.calls.append(("begin", training.total_steps))

    def on_task_begin(self, training):
        self.calls.append(("task begins", training.place.task))

    def on_step(self, training):
        assert training.loss.dim() == 0
        assert training.loss.isfinite()
        self.calls.append(("step", training.place.step))

    def on_epoch_end(self, training):
        self.calls.append(("epoch ends", training.place.epoch, len(training.accuracies)))
        assert training.result.curve[-1] == pytest.approx(
            sum(training.accuracies) / len(training.accuracies)
        )

    def on_task_end(self, training):
        self.calls.append(("task ends", training.method.tasks))

    def on_end(self, training):
        self.calls.append(("end", training.total_steps))


def epoch(number, tasks):
    return [*(("step", k + 1) for k in range(12)), ("epoch ends", number, tasks)]


def test_the_order_of_the_calls():
    record = Record()
    clext.train("si", model=small(), callbacks=[record], **QUICK)
    expected = [("begin", 0)]
    for task in range(2):
        expected += [("task begins", task), *epoch(1, task + 1), *epoch(2, task + 1)]
        expected += [("task ends", task + 1)]
    assert record.calls == [*expected, ("end", 48)]


def test_they_change_nothing():
    seen = clext.train("ewc", model=small(), callbacks=[Record()], **QUICK)
    alone = clext.train("ewc", model=small(), **QUICK)
    assert same(weights(seen.model), weights(alone.model))


def test_a_run_is_stopped(tmp_path):
    class Stop(clext.Callback):
        def on_epoch_end(self, training):
            if len(training.result.curve) == 3:
                raise clext.StopTraining("three epochs are enough")

    record = Record()
    callbacks = [record, Stop()]
    result = clext.train("si", model=small(), out=tmp_path, callbacks=callbacks, **QUICK)
    assert result.stopped == "three epochs are enough"
    assert (len(result.curve), len(result.average_accuracy)) == (3, 1)
    assert record.calls[-1] == ("end", 36)
    assert clext.Result.load(tmp_path).stopped == result.stopped
    resumed = Record()
    whole = clext.train(
        "si", model=small(), out=tmp_path, resume=True, callbacks=[resumed], **QUICK
    )
    assert whole.complete
    assert whole.stopped is None
    # Two epochs are done, and one of the second task, before the end of which it was stopped.
    assert resumed.calls[:2] == [("begin", 24), ("task begins", 1)]


class Epochs(clext.Callback):
    """Counts epochs, across the end of a process."""

    def __init__(self):
        self.count = 0

    def on_epoch_end(self, training):
        self.count += 1
        assert len(training.accuracies) == len(training.result.task_curve[-1])

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_their_state_is_in_the_checkpoint(tmp_path):
    class Stop(clext.Callback):
        def on_step(self, training):
            if training.total_steps == 30:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clext.train("si", model=small(), out=tmp_path, callbacks=[Epochs(), Stop()], **QUICK)
    counter = Epochs()
    clext.train("si", model=small(), out=tmp_path, callbacks=[counter], resume=True, **QUICK)
    assert counter.count == 4


def test_who_began_is_told_of_the_end_and_why():
    class Fail(clext.Callback):
        def on_begin(self, training):  # noqa: ARG002
            raise OSError("no server")

    class Ends(Record):
        def on_end(self, training):
            self.calls.append(training.result.stopped)

    first, last = Ends(), Ends()
    with pytest.raises(OSError, match="no server"):
        clext.train("si", model=small(), callbacks=[first, Fail(), last], **QUICK)
    assert first.calls == [("begin", 0), "no server"]
    assert last.calls == []


def test_the_end_is_called_after_an_error():
    class Fail(clext.Callback):
        def on_step(self, training):  # noqa: ARG002
            raise ZeroDivisionError("mine")

    record = Record()
    with pytest.raises(ZeroDivisionError, match="mine"):
        clext.train("si", model=small(), callbacks=[Fail(), record], **QUICK)
    assert record.calls[-1] == ("end", 1)


@pytest.mark.parametrize("given", [3, [print], "csv", [clext.Callback]])
def test_what_is_no_callback_is_refused(given):
    with pytest.raises(ValueError, match="callbacks must be a list of clext.Callback objects"):
        clext.train("si", model=small(), callbacks=given, **QUICK)


def test_the_trained_model_is_in_the_result():
    model = small()
    before = weights(model)
    result = clext.train("si", model=model, **QUICK)
    assert result.model is model
    assert not same(before, weights(model))
    made = clext.train("si", **{**QUICK, "epochs": 1})
    with torch.no_grad():
        assert made.model(torch.rand(3, 64)).shape == (3, 10)
    assert clext.Result.from_json(made.to_json(), "here").model is None
