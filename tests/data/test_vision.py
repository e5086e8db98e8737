"""The data sets that need torchvision: small files in the real formats, found, read, refused."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import clext
from clext import DataError, Scenario, cli
from clext.data import vision
from clext.data.datasets import Dataset, Split, load_dataset, whereabouts

pytest.importorskip("torchvision")
import vision_files
from torchvision.datasets import utils

from clext.data import image_folders

NAMES = tuple(vision.VISION_DATASETS)


@pytest.fixture(autouse=True)
def lonely_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data in the environment, an empty cache folder, and no way to the network."""
    monkeypatch.delenv("CLEXT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vision, "download", lambda *_args, **_kwargs: "there is no network")


@pytest.mark.parametrize("name", NAMES)
class TestEach:
    def test_is_read_as_bytes_and_learned_as_numbers(self, name, tmp_path, monkeypatch, capsys):
        written = vision_files.write(name, tmp_path, monkeypatch)
        data = load_dataset(name, tmp_path)
        assert (data.num_classes, data.source) == (vision_files.CLASSES[name], "data_dir")
        counts = {part: len(labels) for part, (_, labels) in written.items()}
        line = f"data set {name} ({counts['train']} training, {counts['test']} test"
        assert line in capsys.readouterr().err
        task = Scenario.permuted(name, tasks=1, data_dir=tmp_path).tasks[0]
        for part, split, seen in (
            ("train", data.train, task.train()),
            ("test", data.test, task.test()),
        ):
            pixels, labels = written[part]
            assert split.inputs.dtype == torch.uint8
            assert split.inputs.div(255).equal(vision_files.as_inputs(pixels))
            assert split.labels.dtype == torch.int64
            assert split.labels.tolist() == labels.tolist()
            assert seen.inputs.dtype == torch.float32
            assert (seen.inputs.min(), seen.inputs.max()) == (0, 1)
            assert seen.inputs.shape == split.inputs.shape

    def test_what_is_missing_is_said_with_the_ways_to_get_it(self, name, tmp_path):
        with pytest.raises(
            DataError,
            match=r"cannot be had: none in data_dir .*there is no network.*CLEXT_DATA.*"
            rf"{vision.VISION_DATASETS[name].place}.*pip install 'clext\[vision\]'",
        ):
            load_dataset(name, tmp_path)
        assert "would be downloaded" in whereabouts(tmp_path)[name]

    def test_a_damaged_file_is_refused(self, name, tmp_path, monkeypatch):
        vision_files.write(name, tmp_path, monkeypatch)
        assert str(tmp_path) in whereabouts(tmp_path)[name]
        place = tmp_path / vision.VISION_DATASETS[name].place
        files = [file for file in place.rglob("*") if file.suffix != ".txt"]
        file = min((file for file in files if file.is_file()), default=place)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"missing or damaged ones .*get them again") as caught:
            load_dataset(name, tmp_path)
        assert "\n" not in str(caught.value)

    def test_without_torchvision_it_says_what_to_install(self, name, tmp_path, monkeypatch):
        vision_files.write(name, tmp_path, monkeypatch)
        monkeypatch.setitem(sys.modules, "torchvision", None)
        monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
        with pytest.raises(DataError, match=r"not installed \(pip install 'clext\[vision\]'\)"):
            load_dataset(name, tmp_path)

    def test_a_download_is_read_from_where_it_went(self, name, tmp_path, monkeypatch):
        def fake(class_name: str, root: Path, *, show: bool, parts) -> None:
            assert class_name == vision.VISION_DATASETS[name].class_name
            assert len(parts) == 2
            vision_files.write(name, root, monkeypatch)

        monkeypatch.setattr(vision, "download", fake)
        assert load_dataset(name, tmp_path / "new").source == "a download"


def test_labels_beyond_the_classes_are_refused(tmp_path, monkeypatch):
    vision_files.write("emnist", tmp_path, monkeypatch)
    labels = tmp_path / "EMNIST" / "raw" / "emnist-balanced-test-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([47]))
    with pytest.raises(DataError, match="labels 0 to 47 of 47 classes"):
        load_dataset("emnist", tmp_path)


@pytest.mark.parametrize("is_it", [True, False], ids=["the archive", "another file"])
def test_tiny_imagenet_is_taken_out_of_its_archive_alone(is_it, tmp_path, monkeypatch):
    written = vision_files.write("tiny_imagenet", tmp_path, monkeypatch, train=6, test=3)
    archive = shutil.make_archive(tmp_path / "tiny", "zip", tmp_path, "tiny-imagenet-200")
    checksum = hashlib.md5(Path(archive).read_bytes()).hexdigest() if is_it else "0" * 32
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda _, file: shutil.copy(archive, file))
    monkeypatch.setattr(image_folders.TinyImageNet, "md5", checksum)
    if not is_it:
        with pytest.raises(RuntimeError, match="corrupted"):
            image_folders.TinyImageNet(tmp_path / "new", train=True, download=True)
        return
    found = image_folders.TinyImageNet(tmp_path / "new", train=True, download=True)
    assert found.targets == written["train"][1].tolist()


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("CIFAR10", ["www.cs.toronto.edu"]),
        ("SVHN", 3 * ["ufldl.stanford.edu"]),
        ("TinyImageNet", ["cs231n.stanford.edu"]),
        ("Omniglot", ["raw.githubusercontent.com"]),
    ],
)
def test_the_servers_of_each_kind_of_class_are_asked(name, hosts):
    from clext.data.download import _servers

    urls = _servers(image_folders.dataset_class(name))
    assert [url.split("/")[2] for url in urls] == hosts


def colours() -> Dataset:
    """Two images whose second and third colours are the first plus 1 and plus 2."""
    first = torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4)
    split = Split(torch.cat([first, first + 1, first + 2], dim=1), torch.tensor([0, 1]))
    return Dataset("toy", split, split, 2, "a test")


class TestColours:
    def test_a_permutation_keeps_the_colours_of_a_pixel_together(self):
        seen = clext.data.scenario.make_scenario("permuted", colours(), 1, 0).tasks[0].train()
        pixels = seen.inputs.mul(255).round()
        assert not pixels.equal(colours().train.inputs.float())
        assert pixels[:, 1].equal(pixels[:, 0] + 1)
        assert pixels[0, 0].sort().values.sum() == sum(range(16))

    def test_a_quarter_turn(self):
        seen = clext.data.scenario.make_scenario("rotated", colours(), 2, 0).tasks[1].train()
        expected = colours().train.inputs.float().div(255).rot90(1, (2, 3))
        torch.testing.assert_close(seen.inputs, expected)


def test_a_task_makes_numbers_of_its_own_examples_alone():
    scenario = clext.data.scenario.make_scenario("split", colours(), 2, 0)
    moved = scenario.to(torch.device("cpu"), torch.float64)
    assert moved.tasks[0].stored_train.inputs.dtype == torch.uint8
    train = moved.tasks[0].train()
    assert (train.inputs.dtype, len(train.inputs)) == (torch.float64, 1)
    assert train.inputs.equal(colours().train.inputs[:1].double() / 255)


def test_split_cifar_in_the_command_line(tmp_path, monkeypatch):
    vision_files.write("cifar10", tmp_path, monkeypatch, train=40, test=20)
    outcome = CliRunner().invoke(
        cli.main,
        [
            *("train", "--method", "replay", "--dataset", "cifar10", "--data-dir", str(tmp_path)),
            *("--scenario", "split", "--incremental", "class", "--model", "resnet18"),
            *("--tasks", "2", "--epochs", "1", "--quiet", "--out", str(tmp_path / "out")),
        ],
    )
    assert outcome.exit_code == 0, outcome.output
    result = clext.Result.load(tmp_path / "out")
    assert result.config["model"] == "resnet18"
    assert result.title == "Split CIFAR-10, class-incremental"
    assert result.config["data"]["features"] == 3072
