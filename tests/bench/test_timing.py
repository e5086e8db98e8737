"""How CUDA is timed, on a device that is a clock: bench/speed/timing.py and bench/gpu.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"

if not BENCH.is_dir():
    pytest.skip("bench/ is absent", allow_module_level=True)


class Device:
    """Does a call in 1/8 ms; says when it was waited for."""

    def __init__(self) -> None:
        self.ms, self.calls, self.log = 0.0, 0, []

    def call(self) -> None:
        self.ms += 0.125
        self.calls += 1

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        made = SimpleNamespace()
        made.record = lambda: vars(made).update(at=self.ms)
        made.synchronize = lambda: self.log.append(self.calls)
        made.elapsed_time = lambda end: end.at - made.at
        return made


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50)
    )
    monkeypatch.delattr(torch.cuda, "synchronize")  # after a call it would be timed as well
    return made


@pytest.fixture
def timing(device: Device) -> ModuleType:
    return importlib.import_module("speed.timing")


def test_events_stand_around_as_many_calls_as_can_be_measured(timing: ModuleType, device: Device):
    watch = timing.Stopwatch("cuda")
    watch.time("x", device.call, calls=2)
    assert watch.seconds == {"x": [0.125e-3, 0.125e-3]}
    # One to warm up, then twice as many each time until they take 2 ms, then as many again.
    assert device.log == [2, 4, 8, 16, 32, 48]
    watch.time("x", device.call)
    assert device.log[6:] == [48 + 17]


def test_buffers_are_together_beyond_the_cache(timing: ModuleType):
    assert [timing.sets_beyond_cache(size, "cuda") for size in (10, 51, 200, 1000)] == [20, 4, 1, 1]
    assert timing.sets_beyond_cache(10, "cpu") == 1


def test_copies_move_the_bytes_that_they_are_asked_for(timing: ModuleType):
    (copy,) = timing.copies(800, "cpu")
    target = copy()
    assert 2 * target.numel() * target.element_size() == 800


def test_functions_take_turns(timing: ModuleType):
    done: list[int] = []
    call = timing.in_turns([lambda: done.append(1), lambda: done.append(2)])
    for _ in range(3):
        call()
    assert done == [1, 2, 1]


def test_the_mlp_is_not_timed_where_it_fits_into_the_cache(timing: ModuleType):
    sizes = importlib.import_module("speed.sizes")
    expected = [("mlp", "cpu"), ("vit_b", "cpu"), ("vit_b", "cuda")]
    assert sizes.on_devices({"mlp": 1, "vit_b": 2}, ["cpu", "cuda"]) == expected


def test_a_graph_has_many_calls_on_all_buffers(device: Device, monkeypatch: pytest.MonkeyPatch):
    gpu = importlib.import_module("gpu")
    recorded: list[int] = []

    def capture(function, _device):
        before = device.calls
        function()
        recorded.append(device.calls - before)
        return function

    monkeypatch.setattr(gpu, "capture_graph", capture)
    assert gpu.times([device.call] * 3, "cuda") == {"called": 125.0, "graph": 125.0}
    assert recorded == [21]
