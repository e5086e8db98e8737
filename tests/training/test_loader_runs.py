"""Runs on a user's own data loaders: workers, iterable data sets, mappings, and going on later."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quick_runs import same, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import clext

PER_TASK = 45


def examples(task: int) -> tuple[Tensor, Tensor]:
    """Two classes of points around corners of a cube: 0 and 1, then 2 and 3."""
    random = torch.Generator().manual_seed(task)
    labels = torch.arange(PER_TASK) % 2 + 2 * task
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    noise = 0.1 * torch.randn(PER_TASK, 3, generator=random)
    return (corners[labels] + noise).clamp(0, 1), labels


def data_loaders(**options: Any) -> list[tuple[DataLoader, DataLoader]]:
    """Of both tasks, 5 batches for training and 1 for testing."""
    sets = [TensorDataset(*examples(task)) for task in range(2)]
    return [(DataLoader(own, 10, shuffle=True, **options), DataLoader(own, 45)) for own in sets]


def loaded(incremental: str = "class", pairs: Any = None, **options: Any) -> clext.Scenario:
    classes = [range(4)] * 2 if incremental == "domain" else [[0, 1], [2, 3]]
    return clext.Scenario.from_loaders(
        pairs or data_loaders(**options), classes, incremental=incremental
    )


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))


def run(method: Any, scenario: clext.Scenario, **options: Any) -> clext.Result:
    given = {} if isinstance(method, clext.Method) else {"model": model()}
    settings = {"epochs": 4, "lr": 0.02, "progress": False, "device": "cpu", **given, **options}
    return clext.train(method, scenario=scenario, **settings)


@pytest.mark.parametrize("incremental", ["domain", "task", "class"])
def test_a_run_is_the_loop_over_the_loader(incremental):
    batches = [[(x[:30], y[:30]), (x[30:], y[30:])] for x, y in map(examples, range(2))]
    scenario = loaded(incremental, [(own, own) for own in batches])
    net = model()
    run("ewc", scenario, model=net, epochs=2)

    method = clext.EWC(model())
    for k, own in enumerate(batches):
        start, active = {
            "domain": (0, None),
            "task": (2 * k, range(2 * k, 2 * k + 2)),
            "class": (0, range(2 * k + 2)),
        }[incremental]
        local = [(x, y - start) for x, y in own]
        method.begin_task(block=scenario.tasks[k].outputs, active=active)
        optimizer = clext.optim.Adam(method.model.parameters(), lr=0.02, method=method)
        for x, y in 2 * local:
            F.cross_entropy(method.heads(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        method.consolidate(local)
    assert same(weights(net), weights(method.model))


@pytest.mark.parametrize("method", sorted(clext.METHODS.keys() - {"joint"}))
def test_methods_learn_from_loaders(method):
    result = run(method, loaded("task"))
    assert result.accuracy[1, 1] > 0.9
    assert result.before[1] < 0.9
    assert result.config["batch_size"] == 10


def test_replay_remembers():
    plain, replayed = (run(method, loaded("class")) for method in ("baseline", "ewc+replay"))
    assert plain.accuracy[1, 0] < 0.2
    assert replayed.accuracy[1, 0] > 0.9


def test_workers_prepare_the_batches():
    alone, workers = model(), model()
    run("si", loaded(), model=alone, epochs=1)
    run("si", loaded(num_workers=1), model=workers, epochs=1)
    assert same(weights(alone), weights(workers))


class Stream(IterableDataset):
    """The examples one by one, in their order, without a length."""

    def __init__(self, task: int) -> None:
        self.task, self.passes = task, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return zip(*examples(self.task), strict=True)


class TestIterableDataSets:
    @staticmethod
    def streams() -> list[tuple[DataLoader, DataLoader]]:
        return [(DataLoader(Stream(k), 10), DataLoader(Stream(k), 45)) for k in range(2)]

    def test_pass_after_pass_until_there_were_so_many_steps(self):
        streams, steps = self.streams(), Steps()
        result = run("ewc", loaded("class", streams), iterations=12, epochs=None, callbacks=[steps])
        assert steps.taken == [12, 12]
        assert streams[0][0].dataset.passes == 4  # 5 + 5 + 2 batches, and the Fisher information
        assert result.accuracy[1, 1] > 0.9

    @pytest.mark.parametrize("method", ["ewc", "scp", "replay"])
    def test_of_an_endless_one_as_many_are_measured_as_are_learned(self, method):
        class Endless(IterableDataset):
            def __iter__(self):
                while True:
                    yield from zip(*examples(0), strict=True)

        loaders = [(DataLoader(Endless(), 10), DataLoader(Stream(0), 45))]
        scenario = clext.Scenario.from_loaders(loaders, [range(4)])
        result = run(method, scenario, iterations=12, epochs=None)
        assert result.complete

    def test_without_a_length_iterations_are_asked_for(self):
        with pytest.raises(ValueError, match="loader of task 1 has no length; pass iterations"):
            run("ewc", loaded("class", self.streams()))


class Steps(clext.Callback):
    """Counts those of each task; may end the run after so many, as a crash does."""

    def __init__(self, last: int | None = None) -> None:
        self.taken, self.last = [0, 0], last

    def on_step(self, training: Any) -> None:
        self.taken[training.place.task] += 1
        if sum(self.taken) == self.last:
            raise KeyboardInterrupt


class Points(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, points: Tensor) -> Tensor:
        return self.inner(points)


class TestBatches:
    @pytest.mark.parametrize("incremental", ["domain", "task", "class"])
    def test_mappings(self, incremental):
        given = [[{"points": x, "labels": y, "more": "text"}] for x, y in map(examples, range(2))]
        pairs = [[(x, y)] for x, y in map(examples, range(2))]
        by_name, plain = Points(), model()
        for net, batches in ((by_name, given), (plain, pairs)):
            run("ewc+replay", loaded(incremental, [(own, own) for own in batches]), model=net)
        assert same(weights(by_name), weights(plain))

    def test_any_others_by_functions_of_the_method(self):
        given = [[{"where": x, "kind": y}] for x, y in map(examples, range(2))]
        method = clext.EWC(
            model(), forward=lambda net, batch: net(batch["where"]), labels=lambda b: b["kind"]
        )
        result = run(method, loaded("domain", [(own, own) for own in given]), epochs=60)
        assert result.accuracy[1, 1] > 0.9
        with pytest.raises(ValueError, match="forward= of ewc reads batches as they are"):
            run(method, loaded("class", [(own, own) for own in given]))

    def test_labels_that_are_no_classes_of_examples(self):
        given = [(torch.ones(2, 3), torch.zeros(2, 5, dtype=torch.int64))]
        with pytest.raises(
            ValueError, match=r"test data: labels of a batch are torch.int64 \[2, 5"
        ):
            run("ewc", loaded("domain", [(given, given)] * 2))

    def test_the_model_is_tried_on_the_first_test_batch(self):
        given = [(torch.ones(2, 7), torch.tensor([0, 1]))]
        with pytest.raises(ValueError, match=r"inputs \[N, 7\] into logits \[N, 4\], but failed"):
            run("ewc", loaded("class", [(given, given)] * 2))


class TestSeeds:
    def test_the_order_of_a_loader_is_drawn_from_that_of_the_run(self):
        nets = [model(), model(), model()]
        for net, seed in zip(nets, (0, 0, 1), strict=True):
            run("baseline", loaded(), model=net, seed=seed)
        first, again, other = map(weights, nets)
        assert same(first, again)
        assert not same(first, other)

    def test_more_looks_at_the_tests_change_nothing(self):
        seldom, often = model(0.5), model(0.5)
        run("ewc", loaded(), model=seldom)
        run("ewc", loaded(), model=often, evaluate_every=1)
        assert same(weights(seldom), weights(often))

    @pytest.mark.parametrize(("last", "workers"), [(3, 0), (5, 0), (17, 0), (23, 0), (17, 1)])
    @pytest.mark.parametrize(
        "steps", [{"epochs": 4}, {"iterations": 12, "epochs": None}], ids=["epochs", "steps"]
    )
    def test_a_run_goes_on_to_the_same_bits(self, tmp_path, last, steps, workers):
        whole, parts = model(0.5), model(0.5)
        options = {**steps, "method": "ewc+replay", "scenario": loaded(num_workers=workers)}
        first = run(model=whole, **options)
        with pytest.raises(KeyboardInterrupt):
            run(
                **options,
                model=parts,
                out=tmp_path / "out",
                checkpoint_every=2,
                callbacks=[Steps(last)],
            )
        second = run(**options, model=model(0.5), out=tmp_path / "out", resume=True)
        assert same(weights(whole), weights(second.model))
        assert first.accuracy[1].tolist() == second.accuracy[1].tolist()


class TestDoor:
    def test_joint_needs_all_examples(self):
        for method in ("joint", "ewc+joint"):
            with pytest.raises(ValueError, match="all examples of a task.*from_datasets"):
                run(method, loaded())

    def test_a_comparison_says_so_before_it_starts(self):
        with pytest.raises(ValueError, match="joint needs all examples"):
            clext.compare(["ewc", "joint"], scenario=loaded(), model=model(), progress=False)

    def test_the_model_is_a_module(self):
        with pytest.raises(ValueError, match="pass model, a torch.nn.Module"):
            clext.train("ewc", scenario=loaded(), model="mlp", progress=False)

    def test_the_batch_size_is_that_of_the_loaders(self):
        with pytest.raises(ValueError, match="batch_size=7, but the given scenario has 10; leave"):
            run("ewc", loaded(), batch_size=7)


def test_a_transform_is_of_loaded_and_replayed_examples():
    seen = []

    def transform(example: Tensor) -> Tensor:
        seen.append(example)
        return example

    run("replay", loaded("class"), transform=transform, epochs=1)
    assert len(seen) == 2 + PER_TASK + 2 * PER_TASK
