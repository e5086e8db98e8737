"""`pytest bench/ -s`: every op against its alternatives, in one run, on the same tensors.

Equality is checked first. Time, GB/s, the share of the machine's copy bandwidth and the ratios are
printed and appended to bench/results/ops.jsonl; nothing here fails for being slow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speed.cases import CASES, Case, Lists
from speed.sizes import MODELS, on_devices
from speed.timing import DEVICES, Stopwatch, copy_contestant, machine, record, rounds_for

CALLS_PER_ROUND = 3


def check_equal(case: Case, shapes: Any, device: str) -> None:
    """Every contestant gets the same lists and must leave the same numbers in them."""
    expected: list[torch.Tensor] | None = None
    expected_value: torch.Tensor | None = None
    for name in reversed(list(case.contestants(Lists.make(shapes, device, case.state)))):
        lists = Lists.make(shapes, device, case.state)
        with torch.no_grad():
            value = case.contestants(lists)[name]()
        found = lists.everything()
        if expected is None:  # clext comes first
            expected, expected_value = found, value
            continue
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6, msg=f"{name} differs")
        if value is not None and expected_value is not None:
            torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("model", "device"), on_devices(MODELS, DEVICES))
@pytest.mark.parametrize("op", CASES)
def test_op(op: str, model: str, device: str, benchmark: Any, capsys: Any) -> None:
    case, shapes = CASES[op], MODELS[model]()
    check_equal(case, shapes, device)

    lists = Lists.make(shapes, device, case.state)
    elements = sum(p.numel() for p in lists.params)
    total_bytes = elements * case.bytes_per_element
    contestants = {**case.contestants(lists), "copy": copy_contestant(total_bytes, device)}
    clext = contestants.pop("clext")
    watch = Stopwatch(device)

    def others() -> None:
        for name, contestant in contestants.items():
            watch.time(name, contestant, CALLS_PER_ROUND)
        watch.time("clext", clext, CALLS_PER_ROUND)

    with torch.no_grad():
        for _ in range(3):  # compilers and allocators settle
            others()
        watch.seconds.clear()
        benchmark.pedantic(clext, setup=others, rounds=rounds_for(elements, device))

    seconds = watch.medians()
    mine = seconds["clext"]
    entry = {
        "op": op,
        "model": model,
        "elements": elements,
        "bytes": total_bytes,
        "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
        "gb_per_s": round(total_bytes / mine / 1e9, 1),
        "share_of_copy_bandwidth": round(seconds["copy"] / mine, 3),
        "ratio": {name: round(s / mine, 2) for name, s in seconds.items() if name != "clext"},
        "machine": machine(device),
    }
    benchmark.extra_info.update(entry)
    record("ops", entry)
    with capsys.disabled():
        others_text = "  ".join(f"{n} {entry['ratio'][n]:.2f}x" for n in entry["ratio"])  # type: ignore[index]
        print(
            f"\n{op} {model} {device}: {1e3 * mine:.3f} ms, {entry['gb_per_s']} GB/s, "
            f"{100 * seconds['copy'] / mine:.0f}% of copy bandwidth; against clext: {others_text}"
        )
