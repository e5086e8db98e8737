"""The steps of a task: recorded ones take the same way as launched ones."""

import warnings
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from quick_runs import QUICK, same, small, weights
from torch import nn

import clext
from clext.data.datasets import Split
from clext.training import graphs
from clext.training import task as tasks
from clext.training.graphs import (
    WARM_UP_STEPS,
    GraphedSteps,
    Recording,
    capture_graph,
    graphed_or_not,
    waits_for,
)
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
        model, ours, losses, done = train_two_tasks(
            GraphedSteps, method, "cpu", recording=partial(Recording, capture=recorder)
        )
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
        model, *_ = train_two_tasks(
            GraphedSteps, "si", "cpu", recording=partial(Recording, capture=Recorder())
        )
        assert all(p.grad is None for p in model.parameters())

    def test_fewer_batches_than_a_warm_up_takes(self):
        model = small()
        method = clext.SI(model)
        optimizer = optimizer_of(method)
        recorder = Recorder()
        task_steps = GraphedSteps(
            method,
            optimizer,
            make_split(),
            100,
            "fp32",
            recording=partial(Recording, capture=recorder),
        )
        for _ in range(5):  # one whole batch and a smaller one each
            losses = task_steps.train_on(torch.arange(EXAMPLES), lambda: None)
            assert len(losses) == 2
        assert recorder.recorded == 1
        assert recorder.replayed == 2

    def test_a_step_that_cannot_be_recorded_is_launched(self):
        def refuse(_: Function) -> Function:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        with pytest.warns(UserWarning, match=r"recorded as a CUDA graph \(operation not permitted"):
            model, *_ = train_two_tasks(
                GraphedSteps, "si", "cpu", recording=partial(Recording, capture=refuse)
            )
        expected, *_ = train_two_tasks(TaskSteps, "si", "cpu")
        assert same(weights(model), weights(expected))

    @pytest.mark.parametrize("waiting", [1, WARM_UP_STEPS])
    def test_a_model_that_waits_for_the_device_is_launched(self, waiting):
        """It is seen in a step that is taken all the same; in the first ones much is made."""
        recorder, watched = Recorder(), []

        @contextmanager
        def watch():
            watched.append(1)
            waits = []
            yield waits
            if len(watched) % WARM_UP_STEPS == waiting % WARM_UP_STEPS:
                waits.append("model.py:7 waits for the device")

        def train():
            return train_two_tasks(
                GraphedSteps,
                "si",
                "cpu",
                recording=partial(Recording, capture=recorder, watch=watch),
            )

        if waiting == WARM_UP_STEPS:
            reason = r"recorded as a CUDA graph \(model.py:7 waits for the device, as item"
            with pytest.warns(UserWarning, match=reason):
                model, *_ = train()
        else:
            model, *_ = train()
        assert recorder.recorded == (0 if waiting == WARM_UP_STEPS else 2)
        assert len(watched) == 2 * WARM_UP_STEPS
        expected, *_ = train_two_tasks(TaskSteps, "si", "cpu")
        assert same(weights(model), weights(expected))

    def test_what_waits_for_a_device_is_told_from_other_warnings(self, monkeypatch):
        modes = []
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

        def watched() -> list[str]:
            with waits_for(torch.device("cuda")) as waits:
                warnings.warn("called a synchronizing CUDA operation (set by ...)", stacklevel=1)
                warnings.warn("another", stacklevel=1)
            return waits

        with pytest.warns(UserWarning, match="^another$") as caught:
            waits = watched()
        assert len(waits) == 1
        assert waits[0].startswith("test_steps.py:")
        assert len(caught) == 1
        assert modes == ["warn", 0]

    def test_without_kernels_for_the_device_nothing_is_recorded(self, monkeypatch):
        """Not tried either, for the model to be blamed."""
        method = clext.SI(small())
        optimizer = optimizer_of(method)
        examples = (SimpleNamespace(device=torch.device("cuda")),)
        for found, kind in ((True, GraphedSteps), (False, TaskSteps)):
            monkeypatch.setattr(graphs, "has_kernels", lambda _device, found=found: found)
            assert graphed_or_not(method, optimizer, examples) is kind

    @pytest.mark.parametrize("device", ["cuda"], indirect=True)
    def test_a_model_that_reads_its_results_trains_on_after_it(self, device):
        """Dropout and memory work after a capture that could not be."""

        class Reading(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))

            def forward(self, x):
                y = self.layers(x)
                return y * (1.0 if y.sum().item() > -1e9 else 2.0)

        model = Reading().to(device)
        method = clext.SI(model)
        steps = GraphedSteps(method, optimizer_of(method), make_split(device), BATCH, "fp32")
        with pytest.warns(UserWarning, match="waits for the device"):
            steps.train_on(torch.arange(EXAMPLES, device=device), lambda: None)
        torch.cuda.empty_cache()
        assert model(torch.rand(3, 64, device=device)).isfinite().all()
        assert torch.cuda.current_stream() == torch.cuda.default_stream()

    @pytest.mark.parametrize("device", ["cuda"], indirect=True)
    def test_a_capture_that_fails_leaves_stream_and_draws_as_they_were(self, device):
        before = torch.cuda.get_rng_state()

        def fails() -> None:
            torch.rand(3, device=device).sum().item()

        with pytest.raises(RuntimeError):
            capture_graph(fails, torch.device(device))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert torch.rand(3, device=device).isfinite().all()

    @pytest.mark.parametrize("device", ["cuda"], indirect=True)
    def test_memory_does_not_grow_from_task_to_task(self, device):
        model = small().to(device)
        method, split = clext.SI(model), make_split(device)
        reserved = []
        for _ in range(4):
            own = method.begin_task(tuple(split))
            steps = GraphedSteps(method, optimizer_of(method), own, BATCH, "fp32")
            steps.train_on(torch.randperm(EXAMPLES, device=device), lambda: None)
            method.consolidate([split])
            reserved.append(torch.cuda.memory_reserved())
        assert reserved[3] == reserved[1]


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


class TestOption:
    @pytest.mark.parametrize("given", [{}, {"graphs": False}], ids=str)
    def test_graphs_says_whether_a_step_may_be_recorded(self, given, monkeypatch):
        asked = []

        def graphed_or_not(*args: object) -> type[TaskSteps]:
            asked.append(args)
            return TaskSteps

        monkeypatch.setattr(tasks, "graphed_or_not", graphed_or_not)
        result = clext.train("si", model=small(), **{**QUICK, **given})
        assert len(asked) == (0 if given else QUICK["tasks"])
        assert result.config["graphs"] is not bool(given)

    def test_it_is_a_flag(self):
        with pytest.raises(ValueError, match="graphs must be True or False"):
            clext.train("si", model=small(), **{**QUICK, "graphs": "never"})
