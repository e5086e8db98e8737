"""A loop of accelerate's with a method: nothing of clext is needed for it beside the method."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from framework_loops import plain_loop
from torch.utils.data import DataLoader
from toy_training import assert_same_state, make_model, make_task

import clext

accelerate = pytest.importorskip("accelerate")

CLIP = 0.05  # far below the norm of every gradient here


@pytest.fixture(autouse=True)
def one_accelerator():
    """Accelerate keeps one state for the process, its options among it."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def task(number):
    return make_task(number, torch.float32)[:8]


def by_hand(accelerator, method, model, optimizer, loader):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                method.add_penalty_grad_(accelerator.scaler)
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            if accelerator.sync_gradients and not optimizer.step_was_skipped:
                method.update()
            optimizer.zero_grad()


def fused(accelerator, model, optimizer, loader):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()


def prepared(model, optimizer, data, **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(data, batch_size=None))


@pytest.mark.parametrize(
    ("kind", "precision"), [(clext.EWC, "no"), (clext.SI, "no"), (clext.SI, "bf16")]
)
def test_by_hand_with_clipping_and_accumulation(kind, precision):
    model, expected = make_model(torch.float32), make_model(torch.float32)
    method, oracle = kind(model), kind(expected)
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=0.02) for m in (model, expected))
    accelerator, net, optimizer, _ = prepared(
        model, optimizer, task(0), gradient_accumulation_steps=4, mixed_precision=precision
    )
    half = torch.bfloat16 if precision == "bf16" else None
    for number in range(2):
        loader = accelerator.prepare(DataLoader(task(number), batch_size=None))
        by_hand(accelerator, method, net, optimizer, loader)
        method.consolidate(loader)
        losses = [
            # Accelerate turns back what a model returns in half precision.
            lambda x=x, y=y: F.cross_entropy(expected(x).float(), y)
            for x, y in task(number)
        ]
        plain_loop(oracle, other, losses, accumulate=4, clip=CLIP, autocast=half)
        oracle.consolidate(task(number))
    assert_same_state(dict(model.state_dict()), dict(expected.state_dict()))
    assert_same_state(method.state_dict(), oracle.state_dict())


def begun(folder=None):
    """The loop in the middle of a second task, from the start or from where it was saved."""
    model = make_model(torch.float32)
    method = clext.SI(model)
    optimizer = clext.optim.Adam(model.parameters(), lr=0.02, method=method, max_grad_norm=CLIP)
    accelerator, net, optimizer, loader = prepared(
        model, optimizer, task(0), gradient_accumulation_steps=4
    )
    accelerator.register_for_checkpointing(method)
    if folder is None:
        fused(accelerator, net, optimizer, loader)
        method.consolidate()
        fused(
            accelerator, net, optimizer, accelerator.prepare(DataLoader(task(1), batch_size=None))
        )
    else:
        accelerator.load_state(folder)
    return accelerator, model, method, net, optimizer


def go_on(accelerator, model, method, net, optimizer):
    fused(accelerator, net, optimizer, accelerator.prepare(DataLoader(task(2), batch_size=None)))
    method.consolidate()
    return {"model": dict(model.state_dict()), "method": method.state_dict()}


def test_resumed_in_mid_task_from_a_checkpoint_that_has_the_method(tmp_path):
    run = begun()
    run[0].save_state(tmp_path)
    expected = go_on(*run)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="clext")  # of a method that has not seen the same
        assert_same_state(go_on(*begun(tmp_path)), expected)


@pytest.mark.parametrize("way", ["by hand", "fused"])
def test_a_step_that_the_scaler_skips_is_none(way, monkeypatch):
    def run(bad):
        model = make_model(torch.float32)
        method = clext.SI(model)
        if way == "fused":
            kind, more = clext.optim.Adam, {"method": method, "max_grad_norm": CLIP}
        else:
            kind, more = torch.optim.Adam, {}
        data = task(0)
        if bad:
            data[3:3] = [(torch.full_like(data[0][0], torch.inf), data[0][1])]
        accelerator = accelerate.Accelerator(cpu=True)
        # Accelerate has fp16 on a GPU alone; this is what it sets there.
        monkeypatch.setattr(accelerator, "native_amp", True)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        net, optimizer, loader = accelerator.prepare(
            model, kind(model.parameters(), lr=0.02, **more), DataLoader(data, batch_size=None)
        )
        if way == "fused":
            fused(accelerator, net, optimizer, loader)
        else:
            by_hand(accelerator, method, net, optimizer, loader)
        return [*model.parameters(), *method.state_dict()["state"]["path"].values()]

    for found, expected in zip(run(bad=True), run(bad=False), strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.abs().max() > 0
