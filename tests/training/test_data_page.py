"""What docs/data.md shows is run as it is written."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clext

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
QUICK = {"epochs": 1, "progress": False}


def run(block: int, monkeypatch, **names: object) -> clext.Result:
    """The result of a block, which trains for a moment here."""
    found = []
    train = clext.train
    monkeypatch.setattr(
        clext, "train", lambda *given, **more: found.append(train(*given, **{**more, **QUICK}))
    )
    exec(compile(BLOCKS[block], "docs/data.md", "exec"), {"clext": clext, **names})
    return found[0]


def test_the_page_names_every_data_set():
    assert all(f'"{name}"' in PAGE for name in clext.core.names.DATASETS if name != "auto")


def test_loaders(monkeypatch):
    loaders = {}
    for task in range(2):
        data = TensorDataset(torch.randn(8, 3), torch.arange(8) % 2 + 2 * task)
        loaders[f"train_loader_{task + 1}"] = DataLoader(data, 4, shuffle=True)
        loaders[f"test_loader_{task + 1}"] = DataLoader(data, 4)
    result = run(0, monkeypatch, model=nn.Linear(3, 4), **loaders)
    assert result.complete


def test_texts(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"word{k} again" for k in range(8)], "label": [k % 4 for k in range(8)]}
    part = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda _: {"train": part, "test": part})
    result = run(1, monkeypatch)
    assert result.config["data"]["name"] == "AG News"


def test_transforms(monkeypatch, tmp_path):
    pytest.importorskip("torchvision")
    import vision_files

    vision_files.write("cifar100", tmp_path, monkeypatch)
    monkeypatch.setenv("CLEXT_DATA", str(tmp_path))
    result = run(2, monkeypatch)
    assert result.config["transform"] == "crop-flip"
