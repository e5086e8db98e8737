"""The contestants of bench/others that need no other framework train on a small MNIST."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

OTHERS = Path(__file__).resolve().parents[2] / "bench" / "others"
if not OTHERS.is_dir():
    pytest.skip("bench/ is absent", allow_module_level=True)


@pytest.fixture
def mnist(monkeypatch, tmp_path):
    """A folder with files as MNIST's: the class is where the image is bright."""
    random = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 300), ("t10k", 200)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = random.integers(0, 60, (count, 784), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[78 * int(label) :][:78] += 150
        sizes = [np.array(size, ">u4").tobytes() for size in ([2051, count, 28, 28], [2049, count])]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(sizes[0] + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(sizes[1] + labels.tobytes())
    monkeypatch.setenv("CLEXT_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(str(OTHERS))
    return tmp_path


@pytest.mark.parametrize("method", ["ewc", "si"])
def test_the_loop_by_hand_and_that_with_clext_learn_the_same(mnist, method, monkeypatch, capsys):
    found = {}
    for name in ("by_hand", "with_clext_loop", "with_clext_train", "course_notebook"):
        monkeypatch.setattr(sys, "argv", [name, method, "10", "0"])
        runpy.run_path(str(OTHERS / f"{name}.py"))
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        found[name] = result["accuracies"]
        assert result["seconds"] > 0
        assert len(found[name]) == 2
        assert min(found[name]) > 0.2, name
    assert found["by_hand"] == pytest.approx(found["with_clext_loop"], abs=0.02)


def test_mammoth_is_given_the_first_images(mnist, tmp_path, monkeypatch):
    compare, setting = importlib.import_module("compare"), importlib.import_module("setting")
    monkeypatch.setattr(compare, "IMAGES", 40)
    compare.small_mnist(tmp_path / "small")
    whole = setting.examples("train")
    monkeypatch.setenv("CLEXT_DATA", str(tmp_path / "small" / "MNIST"))
    for folder in ("MNIST", "MyMNIST"):
        small = tmp_path / "small" / "MNIST" / folder / "raw" / "train-images-idx3-ubyte"
        assert small.read_bytes()[:16] == np.array([2051, 40, 28, 28], ">u4").tobytes()
    assert all(a.equal(b[:40]) for a, b in zip(setting.examples("train"), whole, strict=True))
    assert len(setting.examples("t10k")[0]) == 200
