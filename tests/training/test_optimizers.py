"""Optimizers and schedules of `clext.train`: each beside the same loop written out with torch's."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, OneCycleLR

import clext
from clext.core.seeding import Seeds, generator
from clext.training.graphs import GraphedSteps, Recording
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings
from clext.training.steps import TaskSteps

TASKS, EPOCHS, BATCH, LR = 2, 2, 32, 0.05
STEPS = EPOCHS * math.ceil(180 / BATCH)


def own_tasks():
    random = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(TASKS):
        x = torch.randn(240, 6, generator=random)
        y = (x @ torch.randn(6, 3, generator=random)).argmax(1)
        pairs.append(((x[:180], y[:180]), (x[180:], y[180:])))
    return pairs


def make_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))


def trained(method="ewc", **options):
    """The model after a run."""
    model, scenario = make_model(), clext.Scenario.from_datasets(own_tasks())
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "seed": 3, "progress": False}
    result = clext.train(method, model=model, scenario=scenario, **settings, **options)
    return model, result


def written_out(make_optimizer, make_scheduler=None, *, clip=None, keep=False, method=clext.EWC):
    """The same run as a loop of one's own, with optimizers of torch."""
    model = make_model()
    reg = method(model)
    shuffle = generator(Seeds.derive(3).shuffle)
    optimizer = None
    for (x, y), _ in own_tasks():
        if optimizer is None or not keep:
            optimizer = make_optimizer(model.parameters())
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)
            group["lr"] = LR
        scheduler = make_scheduler(optimizer) if make_scheduler else None
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x), generator=shuffle).split(BATCH):
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                reg.add_penalty_grad_()
                optimizer.step()
                reg.update()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
        reg.consolidate([(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)])
    return model


def assert_same(model, expected, **tolerance):
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, **tolerance)


def sgd(params):
    return torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=1e-3)


CASES = {
    "adam": (lambda p: torch.optim.Adam(p, lr=LR), {}),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1), {"weight_decay": 0.1}),
    "sgd": (sgd, {"momentum": 0.9, "weight_decay": 1e-3}),
}
SCHEDULES = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    "step": lambda optimizer: MultiStepLR(optimizer, [STEPS // 2, STEPS * 3 // 4]),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, LR, STEPS, cycle_momentum=False),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_optimizers_by_name(name, keep):
    make, options = CASES[name]
    model, result = trained(optimizer=name, keep_optimizer=keep, **options)
    assert_same(model, written_out(make, keep=keep), rtol=1e-4, atol=1e-5)
    assert result.config["optimizer"] == name
    assert result.config["keep_optimizer"] is keep


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_name(name, keep):
    options = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-3, "keep_optimizer": keep}
    model, _ = trained(scheduler=name, **options)
    assert_same(model, written_out(sgd, SCHEDULES[name], keep=keep), rtol=1e-4, atol=1e-5)


def test_the_norm_is_the_task_gradients():
    model, _ = trained(optimizer="sgd", max_grad_norm=0.1)
    expected = written_out(lambda p: torch.optim.SGD(p, lr=LR), clip=0.1)
    assert_same(model, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_functions(keep):
    made = []

    def make(parameters, method):
        assert isinstance(method, clext.SI)
        made.append(torch.optim.RMSprop(parameters, lr=LR))
        return made[-1]

    def linear(optimizer, steps):
        return LambdaLR(optimizer, lambda step: 1 - step / steps)

    model, result = trained("si", optimizer=make, scheduler=linear, keep_optimizer=keep)
    expected = written_out(
        lambda p: torch.optim.RMSprop(p, lr=LR),
        lambda optimizer: linear(optimizer, STEPS),
        keep=keep,
        method=clext.SI,
    )
    assert_same(model, expected, rtol=1e-4, atol=1e-5)
    assert len(made) == (1 if keep else TASKS)
    assert (result.config["optimizer"], result.config["scheduler"]) == ("make", "linear")
    # The method has left the user's optimizer.
    assert not made[-1]._optimizer_step_pre_hooks


def test_a_function_may_give_the_method_to_the_pass():
    def make(parameters, method):
        return clext.optim.SGD(parameters, lr=LR, method=method)

    given, named = trained("si", optimizer=make)[1], trained("si", optimizer="sgd")[1]
    assert np.array_equal(given.accuracy, named.accuracy, equal_nan=True)


def test_ewc_from_an_optimizer_that_is_kept():
    _, result = trained(fisher="optimizer", keep_optimizer=True)
    assert result.complete


@pytest.mark.parametrize("recorded", [False, True])
def test_recorded_steps_follow_a_rate_that_is_a_tensor(recorded):
    """As on CUDA, where a step is recorded once: the rate changes in place."""
    model = make_model()
    method, x, y = clext.SI(model), *own_tasks()[0][0]
    settings = Settings(lr=LR, optimizer="sgd", scheduler="cosine")
    optimizer = TaskOptimizer(settings, method, [*model.parameters()], torch.device("cpu"))
    assert not optimizer.capturable  # its rate is a number here
    rate = optimizer.optimizer.param_groups[0]["lr"] = torch.tensor(LR)
    assert optimizer.capturable
    optimizer.begin(10)
    recording = partial(Recording, capture=lambda function: function)
    kind = {"recording": recording} if recorded else {}
    make = GraphedSteps if recorded else TaskSteps
    steps = make(method, optimizer, (x[:100], y[:100]), 20, "fp32", **kind)
    losses = [steps.train_on(torch.arange(100), lambda: None).clone() for _ in range(2)]
    assert optimizer.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0, abs=1e-8)
    expected = torch.optim.SGD((start := make_model()).parameters(), lr=LR)
    schedule = CosineAnnealingLR(expected, 10)
    for place in (*range(5), *range(5)):
        rows = slice(20 * place, 20 * place + 20)
        loss = F.cross_entropy(start(x[rows]), y[rows])
        loss.backward()
        expected.step()
        expected.zero_grad()
        schedule.step()
    assert losses[1][-1].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adm"}, "'optimizer' of train: 'adm'; did you mean 'adam'"),
        ({"scheduler": "cosin"}, "'scheduler' of train: 'cosin'; did you mean 'cosine'"),
        ({"momentum": 0.9}, 'momentum is for optimizer="sgd"'),
        ({"optimizer": "sgd", "momentum": -1}, "momentum must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"max_grad_norm": 0}, "max_grad_norm must be"),
        ({"keep_optimizer": 1}, "keep_optimizer must be True or False"),
        ({"optimizer": lambda *_: None, "weight_decay": 0.1}, "leave it to your function"),
        ({"optimizer": lambda *_: None}, "returned a NoneType, expected a torch.optim Optimizer"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        trained(**options)
