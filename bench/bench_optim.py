"""`pytest bench/bench_optim.py -s`: the fused step against separate passes and course loops.

For Adam and SGD with momentum, without a method and with EWC, SI and RWalk in their second task.
All contestants must arrive at the same parameters first. Appended to bench/results/optim.jsonl; the
targets are printed and recorded, nothing here fails for being slow.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from speed.sizes import MODELS, on_devices
from speed.steppers import CLEXT_OPTIMIZERS, METHOD_LISTS, Course, Fused, Separate, least_traffic
from speed.timing import DEVICES, Stopwatch, copy_contestant, machine, record, rounds_for

CALLS_PER_ROUND = 3
CHECKED_STEPS = 3
# How many times faster the fused step is to be, where there is something to fuse.
TARGETS = {"separate": 1.5, "course": 12.0}

Stepper = Course | Separate | Fused


def check_equal(steppers: dict[str, Stepper]) -> None:
    """All take the same few steps from the same numbers to the same parameters."""
    expected = steppers["fused"]
    # The gradient of the loss alone, the same for all: some add the penalty's to `.grad`.
    grads = [p.grad.clone() for p in expected.model.parameters() if p.grad is not None]
    for _ in range(CHECKED_STEPS):
        for stepper in steppers.values():
            for p, grad in zip(stepper.model.parameters(), grads, strict=True):
                if p.grad is not None:
                    p.grad.copy_(grad)
            stepper.step()
    for name, stepper in steppers.items():
        pairs = zip(stepper.model.parameters(), expected.model.parameters(), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=f"{name} differs")
    check_state_equal(steppers["separate"], expected)


def check_state_equal(separate: Stepper, fused: Stepper) -> None:
    """Path integral and Fisher average of clext's own two ways agree."""
    if isinstance(separate, Course) or isinstance(fused, Course) or separate.method is None:
        return
    assert fused.method is not None
    got, want = (method.state_dict()["state"] for method in (separate.method, fused.method))
    for key in ("path", "fisher"):
        for name, entry in want.get(key, {}).items():
            torch.testing.assert_close(got[key][name], entry, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("model", "device"), on_devices(MODELS, DEVICES))
@pytest.mark.parametrize("method", METHOD_LISTS)
@pytest.mark.parametrize("optimizer", CLEXT_OPTIMIZERS)
def test_step(
    optimizer: str, method: str, model: str, device: str, benchmark: Any, capsys: Any
) -> None:
    gc.collect()  # the contestants of a large model fill much of the memory
    shapes = MODELS[model]()
    steppers: dict[str, Stepper] = {
        "course": Course(optimizer, method, shapes, device),
        "separate": Separate(optimizer, method, shapes, device),
        "fused": Fused(optimizer, method, shapes, device),
    }
    check_equal(steppers)

    elements = sum(p.numel() for p in steppers["fused"].model.parameters())
    reads, writes = least_traffic(optimizer, method)
    total_bytes = 4 * (reads + writes) * elements
    copy = copy_contestant(total_bytes, device)
    watch = Stopwatch(device)

    def others() -> None:
        for name, stepper in steppers.items():
            watch.time(name, stepper.step, CALLS_PER_ROUND)
        watch.time("copy", copy, CALLS_PER_ROUND)

    others()
    watch.seconds.clear()
    benchmark.pedantic(steppers["fused"].step, setup=others, rounds=rounds_for(elements, device))

    seconds = watch.medians()
    ratio = {name: round(watch.ratio(name, "fused"), 2) for name in ("course", "separate", "copy")}
    entry = {
        "optimizer": optimizer,
        "method": method,
        "model": model,
        "elements": elements,
        "bytes": total_bytes,
        "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
        "gb_per_s": round(total_bytes / seconds["fused"] / 1e9, 1),
        "share_of_copy_bandwidth": round(watch.ratio("copy", "fused"), 3),
        "ratio": ratio,
        "targets": {} if method == "none" else TARGETS,
        "machine": machine(device),
    }
    benchmark.extra_info.update(entry)
    record("optim", entry)
    with capsys.disabled():
        print(f"\n{optimizer} {method} {model} {device}: {described(entry)}")


def described(entry: dict[str, Any]) -> str:
    against = ", ".join(
        f"{name} {entry['ratio'][name]:.2f}x"
        + (f" (target {entry['targets'][name]:g}x)" if name in entry["targets"] else "")
        for name in ("separate", "course")
    )
    return (
        f"{entry['ms']['fused']:.3f} ms, {entry['bytes'] / entry['elements']:.0f} bytes/element, "
        f"{entry['gb_per_s']} GB/s, {100 * entry['share_of_copy_bandwidth']:.0f}% of copy "
        f"bandwidth; times of the others over it: {against}"
    )
