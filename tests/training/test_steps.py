"""The steps of a task: recorded ones take the same way as launched ones."""

import warnings

import pytest
import torch
from quick_runs import QUICK, same, small, weights
from torch import nn

import clext
from clext.data.datasets import Split
from clext.training.graphs import WARM_UP_STEPS, GraphedSteps
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings
from clext.training.steps import Function, TaskSteps

CAPTURABLE = sorted(
    name for name, kind in clext.METHODS.items() if kind.fused is not None and kind.capturable
)
EXAMPLES, BATCH, EPOCHS = 150, 16, 3


def make_split(device: str = "cpu") -> Split:
    random = torch.Generator().manual_seed(5)
    inputs = torch.rand(EXAMPLES, 64, generator=random)
    labels = torch.randint(10, (EXAMPLES,), generator=random)
    return Split(inputs.to(device), labels.to(device))


class Recorder:
    """Stands in for a CUDA graph: like one it launches nothing while it records."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, function: Function) -> Function:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            function()

        return replay


def optimizer_of(method: clext.Method) -> TaskOptimizer:
    parameters = [*method.model.parameters()]
    return TaskOptimizer(Settings(lr=1e-2), method, parameters, parameters[0].device)


def train_two_tasks(kind: type[TaskSteps], method_name: str, device: str, **options: object):
    model = small().to(device)
    method = clext.METHODS[method_name](model)
    split, done, losses = make_split(device), [], []
    for task in range(2):
        optimizer = optimizer_of(method)
        examples = [entry[:EXAMPLES] for entry in method.begin_task(tuple(split))]
        task_steps = kind(method, optimizer, tuple(examples), BATCH, "fp32", **options)
        random = torch.Generator().manual_seed(task)
        for _ in range(EPOCHS):
            order = torch.randperm(EXAMPLES, generator=random).to(device)
            losses.append(task_steps.train_on(order, lambda: done.append(1)).clone())
        method.consolidate([split])
    return model, method, torch.stack(losses), len(done)


class TestRecordedSteps:
    @pytest.mark.parametrize("method", CAPTURABLE)
    def test_equal_launched_ones_bit_for_bit(self, method):
        recorder = Recorder()
        model, ours, losses, done = train_two_tasks(GraphedSteps, method, "cpu", capture=recorder)
        expected, theirs, expected_losses, expected_done = train_two_tasks(TaskSteps, method, "cpu")
        assert same(weights(model), weights(expected))
        assert losses.equal(expected_losses)
        assert done == expected_done == 2 * EPOCHS * 10
        for name, importance in getattr(ours, "importance", {}).items():
            assert importance.equal(theirs.importance[name])
        assert recorder.recorded == 2  # once a task
        assert recorder.replayed == 2 * (EPOCHS * 9 - WARM_UP_STEPS)

    @pytest.mark.parametrize("device", ["cuda"], indirect=True)
    @pytest.mark.parametrize("method", CAPTURABLE)
    def test_a_cuda_graph_takes_the_same_way(self, method, device):
        model, _, losses, _ = train_two_tasks(GraphedSteps, method, device)
        expected, _, expected_losses, _ = train_two_tasks(TaskSteps, method, device)
        torch.testing.assert_close(weights(model), weights(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)

    def test_leave_no_gradient_behind(self):
        model, *_ = train_two_tasks(GraphedSteps, "si", "cpu", capture=Recorder())
        assert all(p.grad is None for p in model.parameters())

    def test_fewer_batches_than_a_warm_up_takes(self):
        model = small()
        method = clext.SI(model)
        optimizer = optimizer_of(method)
        recorder = Recorder()
        task_steps = GraphedSteps(method, optimizer, make_split(), 100, "fp32", capture=recorder)
        for _ in range(5):  # one whole batch and a smaller one each
            losses = task_steps.train_on(torch.arange(EXAMPLES), lambda: None)
            assert len(losses) == 2
        assert recorder.recorded == 1
        assert recorder.replayed == 2

    def test_a_step_that_cannot_be_recorded_is_launched(self):
        def refuse(_: Function) -> Function:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        with pytest.warns(UserWarning, match=r"recorded as a CUDA graph \(operation not permitted"):
            model, *_ = train_two_tasks(GraphedSteps, "si", "cpu", capture=refuse)
        expected, *_ = train_two_tasks(TaskSteps, "si", "cpu")
        assert same(weights(model), weights(expected))


class TestPrecision:
    def test_bf16_computes_in_bfloat16_and_keeps_float32_state(self, device):
        seen = set()

        class Watching(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                output = super().forward(x)
                seen.add(output.dtype)
                return output

        model = Watching(64, 10)
        result = clext.train("si", model=model, lr=1e-2, precision="bf16", device=device, **QUICK)
        assert torch.bfloat16 in seen
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert result.config["precision"] == "bf16"
        assert result.average_accuracy[-1] > 0.5

    @pytest.mark.parametrize("name", ["gem", "agem"])
    def test_bf16_is_also_that_of_what_a_method_runs_in_the_step(self, name):
        seen = []
        model = small()
        model.register_forward_hook(lambda layer, _x, y: seen.append((layer.training, y.dtype)))
        clext.train(name, model=model, lr=1e-2, precision="bf16", **QUICK)
        assert {dtype for training, dtype in seen if training} == {torch.bfloat16}

    def test_fp32_is_the_default_and_others_are_refused(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = clext.train("si", model=small(), lr=1e-2, **QUICK)
        assert done.config["precision"] == "fp32"
        with pytest.raises(ValueError, match="'precision' of train.*'bf17'.*'bf16'"):
            clext.train("si", precision="bf17", **QUICK)
