"""`ContinualCallback` in Lightning's Trainer, against the loop written out."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from framework_loops import plain_loop
from torch import nn
from torch.utils.data import DataLoader
from toy_training import assert_same_state, make_model, make_task

import clext

lightning = pytest.importorskip("lightning.pytorch")
from clext.integrations.lightning import ContinualCallback  # noqa: E402

CLIP = 0.05  # far below the norm of every gradient here


class Net(lightning.LightningModule):
    def __init__(self, make_optimizer=None, loss=None):
        super().__init__()
        self.net = make_model(torch.float32)
        self.make_optimizer = make_optimizer or (lambda params: torch.optim.Adam(params, lr=0.02))
        self.loss = loss or (lambda x, y: F.cross_entropy(self(x), y))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return self.loss(*batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class ByHand(Net):
    automatic_optimization = False

    def training_step(self, batch, number):
        self.manual_backward(self.loss(*batch) / 2)
        if number % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        self.clip_gradients(optimizer, CLIP)


def task(number):
    return make_task(number, torch.float32)


def loader(batches):
    return DataLoader(batches, batch_size=None)


def trainer(callback, **options):
    # What Lightning tells of few workers and unused hardware is no matter here.
    warnings.filterwarnings("ignore", module="lightning")
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **{"max_epochs": 2, **options},
    )


def fitted(method_of, net=None, tasks=2, **options):
    net = net or Net()
    method = method_of(net)
    for number in range(tasks):
        trainer(ContinualCallback(method, consolidate=True), **options).fit(
            net, loader(task(number))
        )
    return net, method


def looped(method_of, tasks=2, **options):
    net = Net()
    method = method_of(net)
    for number in range(tasks):
        losses = [lambda x=x, y=y: F.cross_entropy(net(x), y) for x, y in task(number) * 2]
        plain_loop(method, net.configure_optimizers(), losses, **options)
        method.consolidate(task(number))
    return net, method


def path_of(method):
    return method.state_dict()["state"]["path"].values()


def assert_same(one, other):
    assert_same_state(one[0].state_dict(), other[0].state_dict())
    assert_same_state(one[1].state_dict(), other[1].state_dict())


@pytest.mark.parametrize("kind", [clext.EWC, clext.SI, clext.RWalk, clext.AGEM])
def test_the_loop_with_clipping(kind):
    assert_same(fitted(kind, gradient_clip_val=CLIP), looped(kind, clip=CLIP))


def test_the_loop_with_accumulation():
    """11 batches: the last step of an epoch has three of four, and Lightning divides by four."""
    whole = {"accumulate_grad_batches": 4, "limit_train_batches": 8, "max_epochs": 1}
    net, method = fitted(clext.SI, tasks=1, gradient_clip_val=CLIP, **whole)

    expected = Net()
    oracle = clext.SI(expected)
    losses = [lambda x=x, y=y: F.cross_entropy(expected(x), y) for x, y in task(0)[:8]]
    options = {"accumulate": 4, "clip": CLIP}
    plain_loop(oracle, expected.configure_optimizers(), losses, **options)
    assert oracle.steps == 2
    oracle.consolidate()
    assert_same((net, method), (expected, oracle))


def test_the_loop_in_bfloat16():
    half = fitted(clext.SI, precision="bf16-mixed", gradient_clip_val=CLIP)
    assert_same(half, looped(clext.SI, autocast=torch.bfloat16, clip=CLIP))


def test_manual_optimization_that_clips_in_the_hook_after_the_callback():
    half = ByHand()
    net, method = fitted(clext.SI, half, tasks=1, limit_train_batches=10, max_epochs=1)
    expected = Net()
    oracle = clext.SI(expected)
    losses = [lambda x=x, y=y: F.cross_entropy(expected(x), y) for x, y in task(0)[:10]]
    plain_loop(oracle, expected.configure_optimizers(), losses, accumulate=2, clip=CLIP)
    oracle.consolidate()
    assert_same((net, method), (expected, oracle))


def test_importance_from_the_optimizer_of_the_fit():
    def kind(module):
        return clext.EWC(module, fisher="optimizer")

    net, method = fitted(kind)
    expected = Net()
    oracle = kind(expected)
    for number in range(2):
        optimizer = expected.configure_optimizers()
        losses = [lambda x=x, y=y: F.cross_entropy(expected(x), y) for x, y in task(number) * 2]
        plain_loop(oracle, optimizer, losses)
        oracle.consolidate(optimizer)
    assert_same((net, method), (expected, oracle))


def test_si_sees_the_gradient_before_it_is_clipped():
    net, expected = Net(), Net()
    method, oracle = clext.SI(net), clext.SI(expected)
    trainer(ContinualCallback(method), gradient_clip_val=CLIP).fit(net, loader(task(0)))
    losses = [lambda x=x, y=y: F.cross_entropy(expected(x), y) for x, y in task(0) * 2]
    path = plain_loop(oracle, expected.configure_optimizers(), losses, clip=CLIP)
    assert method.steps == len(losses)
    for found, by_hand in zip(path_of(method), path, strict=True):
        torch.testing.assert_close(found, by_hand)


def test_a_method_for_a_part_of_the_module_and_with_a_loss_of_its_own():
    net, expected = Net(), Net()
    method, oracle = (clext.Combined(clext.SI(m.net), clext.Replay(m.net)) for m in (net, expected))
    net.loss = method.loss
    for number in range(2):
        trainer(ContinualCallback(method, consolidate=True)).fit(net, loader(task(number)))
        losses = [lambda x=x, y=y: oracle.loss(x, y) for x, y in task(number) * 2]
        plain_loop(oracle, expected.configure_optimizers(), losses)
        oracle.consolidate(task(number))
    assert_same((net, method), (expected, oracle))


def test_an_optimizer_beside_it_for_another_part_of_the_module():
    """The pull is once in a step of the method's own optimizer, whatever the other one does."""

    class Two(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.net, self.critic = make_model(torch.float32), nn.Linear(3, 1)

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.critic)]

        def training_step(self, batch):
            first, second = self.optimizers()
            logits = self.net(batch[0])
            self.manual_backward(F.cross_entropy(logits, batch[1]))
            self.manual_backward(self.critic(logits.detach()).mean())
            second.step()
            first.step()
            second.step()
            for optimizer in (first, second):
                optimizer.zero_grad()

    module, expected = Two(), make_model(torch.float32)
    method, oracle = clext.SI(module.net), clext.SI(expected)
    for number in range(2):
        trainer(ContinualCallback(method, consolidate=True), max_epochs=1).fit(
            module, loader(task(number))
        )
        losses = [lambda x=x, y=y: F.cross_entropy(expected(x), y) for x, y in task(number)]
        plain_loop(oracle, torch.optim.SGD(expected.parameters(), lr=0.1), losses)
        oracle.consolidate()
    assert_same((module.net, method), (expected, oracle))


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "clext"])
def test_resumed_in_mid_task(tmp_path, fused):
    kind = clext.optim.AdamW if fused else torch.optim.AdamW

    def begun():
        net = Net(lambda params: kind(params, lr=0.02))
        method = clext.SI(net)
        trainer(ContinualCallback(method, consolidate=True)).fit(net, loader(task(0)))
        return net, method

    net, method = begun()
    trainer(ContinualCallback(method), max_epochs=4).fit(net, loader(task(1)))
    method.consolidate()

    stopped, before = begun()
    first = trainer(ContinualCallback(before), max_epochs=2)
    first.fit(stopped, loader(task(1)))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Net(stopped.make_optimizer)
    after = clext.SI(resumed)
    second = trainer(ContinualCallback(after, consolidate=True), max_epochs=4)
    second.fit(resumed, loader(task(1)), ckpt_path=tmp_path / "half.ckpt")
    assert_same((resumed, after), (net, method))


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "clext"])
def test_a_step_that_the_scaler_skips_is_none(fused):
    """And gradients are unscaled, by Lightning or in the step of the optimizer."""
    from lightning.pytorch.plugins import MixedPrecision

    def run(bad):
        kind = clext.optim.Adam if fused else torch.optim.Adam
        net = Net(lambda params: kind(params, lr=0.02))
        method = clext.SI(net)
        batches = task(0)
        if bad:
            batches.insert(3, (torch.full_like(batches[0][0], torch.inf), batches[0][1]))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer(ContinualCallback(method), plugins=[plugin], max_epochs=1).fit(net, loader(batches))
        return net, method

    with_it, without = run(bad=True), run(bad=False)
    for one, other in zip(with_it[0].parameters(), without[0].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(path_of(with_it[1]), path_of(without[1]), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


# ----------------------------------------------------------------------------- refused


def refused(method, net, message):
    before = [entry.clone() for entry in net.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer(ContinualCallback(method)).fit(net, loader(task(0)))
    assert all(map(torch.equal, before, net.parameters()))


def test_a_method_of_another_model():
    refused(clext.SI(make_model()), Net(), "ContinualCallback: 0 optimizers step parameters")


def test_an_optimizer_that_has_the_method():
    net = Net(lambda params: clext.optim.AdamW(params, method=method))
    method = clext.SI(net)
    refused(method, net, "make it without method=")


def test_two_optimizers_with_parts_of_the_model():
    class Two(ByHand):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[place].parameters(), lr=0.1) for place in (0, 2)]

    net = Two()
    refused(clext.SI(net), net, "2 optimizers step parameters")


def test_no_method():
    with pytest.raises(TypeError, match="expected a method of clext, got Linear"):
        ContinualCallback(nn.Linear(1, 1))
