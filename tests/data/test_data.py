"""The data sets: where they come from, what is said about it, and what happens to broken files."""

import gzip
import struct
import sys
import tempfile
import tracemalloc
import types
import urllib.error
from pathlib import Path

import pytest
import torch

from clext.data import datasets as data
from clext.data import download
from clext.data.datasets import Batches, DataError, Split, load_dataset, whereabouts

NAMES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
FASHION_OPENING = bytes((9, 0, 0, 3, 0, 2, 7, 2, 5, 5))


def images(count: int, side: int = 28) -> bytes:
    pixels = bytes((7 * i) % 256 for i in range(count * side * side))
    return struct.pack(">4i", 0x803, count, side, side) + pixels


def labels(values: bytes) -> bytes:
    return struct.pack(">2i", 0x801, len(values)) + values


def write_dataset(folder: Path, *, zipped: bool = False, train_labels: bytes | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train_labels = bytes(range(10)) + b"\x03\x04" if train_labels is None else train_labels
    contents = {
        "train images": images(len(train_labels)),
        "train labels": labels(train_labels),
        "test images": images(5),
        "test labels": labels(bytes(5)),
    }
    for kind, content in contents.items():
        if zipped:
            (folder / f"{NAMES[kind]}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / NAMES[kind]).write_bytes(content)


@pytest.fixture(autouse=True)
def lonely_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data in the environment, an empty cache folder, and no way to the network."""
    monkeypatch.delenv("CLEXT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "download", lambda *_args, **_kwargs: "there is no network")
    return tmp_path / "cache" / "clext"


class TestSources:
    @pytest.mark.parametrize(
        ("layout", "zipped"),
        [("MNIST/raw", False), ("MNIST", True), ("raw", True), (".", False)],
    )
    def test_reads_every_layout_plain_and_gzipped(self, tmp_path, layout, zipped):
        write_dataset(tmp_path / layout, zipped=zipped)
        dataset = load_dataset("mnist", tmp_path)
        assert dataset.train.inputs.shape == (12, 784)
        assert dataset.train.inputs.dtype == torch.uint8
        assert dataset.train.inputs[0, :3].tolist() == [0, 7, 14]
        assert dataset.train.labels.tolist() == [*range(10), 3, 4]
        assert dataset.train.labels.dtype == torch.int64
        assert len(dataset.test.labels) == 5
        assert dataset.source == "data_dir"

    def test_the_environment_comes_before_the_cache(self, tmp_path, monkeypatch, lonely_machine):
        write_dataset(lonely_machine / "MNIST" / "raw")
        assert load_dataset("mnist").source == "the cache folder"
        write_dataset(tmp_path / "mine", train_labels=bytes(20))
        monkeypatch.setenv("CLEXT_DATA", str(tmp_path / "mine"))
        dataset = load_dataset("auto")
        assert (dataset.source, len(dataset.train.labels)) == ("$CLEXT_DATA", 20)

    def test_a_given_folder_is_the_only_one_looked_in(self, tmp_path, lonely_machine):
        write_dataset(lonely_machine)
        with pytest.raises(DataError, match=r"data_dir .* does not exist"):
            load_dataset("mnist", tmp_path / "typo")

    def test_kmnist_has_a_folder_of_its_own(self, tmp_path):
        write_dataset(tmp_path / "KMNIST" / "raw", zipped=True)
        assert load_dataset("kmnist", tmp_path).name == "kmnist"
        assert str(tmp_path) in whereabouts(tmp_path)["kmnist"]
        write_dataset(tmp_path / "other", train_labels=FASHION_OPENING)
        with pytest.raises(DataError, match=r"the files in .* are Fashion-MNIST"):
            load_dataset("kmnist", tmp_path / "other")

    def test_fashion_mnist_is_not_mistaken_for_mnist(self, tmp_path):
        write_dataset(tmp_path, train_labels=FASHION_OPENING)
        assert load_dataset("fashion_mnist", tmp_path).name == "fashion_mnist"
        with pytest.raises(DataError, match=r"the files in .* are Fashion-MNIST"):
            load_dataset("mnist", tmp_path)

    def test_a_download_is_read_from_where_it_went(self, monkeypatch, tmp_path, capsys):
        def fake(class_name: str, root: Path, *, show: bool) -> None:
            write_dataset(root / class_name / "raw")

        monkeypatch.setattr(data, "download", fake)
        assert load_dataset("auto", tmp_path / "new").source == "a download"
        assert "data set mnist" in capsys.readouterr().err


class TestAnnouncement:
    @pytest.mark.parametrize("name", ["auto", "digits"])
    def test_exactly_one_line_on_stderr(self, name, capsys):
        load_dataset(name)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("clext: data set digits (1,442 training, 355 test images")
        assert err.count("\n") == 1

    def test_the_fallback_says_why_and_what_to_do(self, capsys):
        assert load_dataset("auto").describe()["name"] == "digits"
        line = capsys.readouterr().err
        assert all(w in line for w in ("stands in for MNIST", "there is no network", "CLEXT_DATA"))

    def test_strict_names_never_fall_back(self):
        for name in ("mnist", "fashion_mnist", "kmnist"):
            with pytest.raises(
                DataError, match=r"data_dir.*CLEXT_DATA.*pip install 'clext\[vision\]'"
            ):
                load_dataset(name)

    def test_a_record_of_the_data_holds_no_path(self, tmp_path):
        write_dataset(tmp_path)
        assert str(tmp_path) not in str(load_dataset("mnist", tmp_path).describe())

    def test_unknown_name_suggests_the_nearest(self):
        with pytest.raises(ValueError, match=r"unknown dataset 'minst'.*'mnist'"):
            load_dataset("minst")

    def test_whereabouts_reads_nothing(self, tmp_path):
        write_dataset(tmp_path)
        (tmp_path / NAMES["train images"]).write_bytes(b"broken")
        places = whereabouts(tmp_path)
        assert str(tmp_path) in places["mnist"]
        assert places["digits"] == "comes with scikit-learn"

    def test_without_a_home_the_cache_is_in_the_temporary_folder(self, monkeypatch):
        def unknown(uid: int) -> None:
            raise KeyError(uid)

        for name in ("XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", unknown)
        assert data.cache_folder() == Path(tempfile.gettempdir()) / "clext"
        assert load_dataset("auto").name == "digits"
        with pytest.raises(ValueError, match="^data_dir: the home folder in '~/data' is not known"):
            load_dataset("mnist", "~/data")
        monkeypatch.setenv("CLEXT_DATA", "~nosuchuser/data")
        with pytest.raises(ValueError, match="^CLEXT_DATA: the home folder in '~nosuchuser/data'"):
            load_dataset("mnist")


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("kind", "content", "message"),
        [
            ("train images", images(12)[:-1], r"truncated: .*12 images.* 9,424 bytes, found 9,423"),
            ("train images", images(12) + b"\0", "too long"),
            (
                "train images",
                b"\x00\x00\x08\x03\x00",
                "truncated: .* 0 images, so 16 bytes, found 5",
            ),
            ("train images", b"", "expected 0x00000803 at its start, found an empty file"),
            ("train images", b"<html>404</html>", "not an IDX image file: .* found 0x3c68746d"),
            ("train images", labels(bytes(12)), "found 0x00000801"),
            ("train images", images(12, side=32), "expected images of 28 x 28, found 32 x 32"),
            ("test images", images(0), "truncated: its header says 0 images"),
            ("train labels", labels(bytes(11)), "expected 12 labels, one an image, found 11"),
            ("test labels", labels(bytes((0, 1, 2, 3, 10))), "expected labels 0 to 9, found 10"),
            ("train labels", images(12), "not an IDX label file"),
            ("train images", gzip.compress(images(12))[:-20], "expected a complete gzip file"),
            ("test labels", b"\x1f\x8bnonsense", "expected a complete gzip file"),
        ],
    )
    def test_one_sentence_names_the_file(self, tmp_path, kind, content, message):
        write_dataset(tmp_path)
        (tmp_path / NAMES[kind]).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            load_dataset("auto", tmp_path)  # which does not fall back then
        assert str(tmp_path / NAMES[kind]) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("count", [12, 0xFFFFFFFF])
    def test_what_unpacks_to_far_more_than_its_header_says_is_not_unpacked(self, tmp_path, count):
        write_dataset(tmp_path)
        packed = gzip.compress(struct.pack(">4i", 0x803, 12, 28, 28) + bytes(2**26))
        if count > 12:  # or the header promises what no file has
            packed = gzip.compress(struct.pack(">4I", 0x803, count, 28, 28))
        (tmp_path / NAMES["train images"]).write_bytes(packed)
        tracemalloc.start()
        with pytest.raises(DataError, match="too long: .* more" if count == 12 else "truncated"):
            load_dataset("mnist", tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**23

    def test_what_is_missing_is_named(self, tmp_path):
        write_dataset(tmp_path)
        (tmp_path / NAMES["test labels"]).unlink()
        with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
            load_dataset("mnist", tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="is not a folder"):
            load_dataset("mnist", tmp_path / "file")


class TestDigits:
    def test_the_split_is_fixed_stratified_and_complete(self):
        first, second = load_dataset("digits"), load_dataset("digits")
        assert first.train.inputs.equal(second.train.inputs)
        assert first.train.inputs.dtype == torch.float32
        assert (first.train.inputs.min(), first.train.inputs.max()) == (0, 1)
        assert len(first.train.labels) + len(first.test.labels) == 1797
        share = first.test.labels.bincount() / (
            first.test.labels.bincount() + first.train.labels.bincount()
        )
        assert share.min() > 0.19
        assert share.max() <= 0.2

    def test_without_scikit_learn_the_error_says_so(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DataError, match="pip install scikit-learn"):
            load_dataset("digits")


class TestDownload:
    """`clext.data.download` itself, with torchvision and the network played by the tests."""

    @staticmethod
    def torchvision(monkeypatch, fail: Exception | None = None) -> list[Path]:
        calls: list[Path] = []

        def fetch(root: Path, *, train: bool, download: bool) -> None:
            print("Downloading noise")
            calls.append(root)
            if fail is not None:
                raise fail

        class Source:
            mirrors = ("http://first.invalid/", "http://second.invalid/")

            def __new__(cls, root: Path, **options):
                return fetch(root, **options)

        package = types.ModuleType("torchvision")
        package.datasets = types.ModuleType("torchvision.datasets")
        classes = types.ModuleType("clext.data.image_folders")
        classes.dataset_class = {"MNIST": Source}.get
        monkeypatch.setitem(sys.modules, classes.__name__, classes)
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", package.datasets)
        return calls

    def test_no_torchvision_is_a_reason(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
        assert "not installed" in download.download("MNIST", tmp_path, show=True)

    def test_a_torchvision_that_fails_to_import_is_a_reason(self, monkeypatch, tmp_path):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist\\nand a second line')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        problem = download.download("MNIST", tmp_path, show=True)
        assert "cannot be imported (operator torchvision::nms does not exist)" in problem

    def test_no_network_fails_before_anything_is_written(self, monkeypatch, tmp_path, capfd):
        calls = self.torchvision(monkeypatch)

        def refuse(*_args: object, **_kwargs: object) -> None:
            raise urllib.error.URLError("no route to host")

        monkeypatch.setattr(download.urllib.request, "urlopen", refuse)
        problem = download.download("MNIST", tmp_path / "new", show=True)
        assert problem == "the download servers cannot be reached from here"
        assert calls == []
        assert not (tmp_path / "new").exists()
        assert capfd.readouterr() == ("", "")

    def test_servers_that_never_answer_do_not_hang(self, monkeypatch, tmp_path):
        self.torchvision(monkeypatch)
        release = download.threading.Event()
        monkeypatch.setattr(download, "_PROBE_SECONDS", 0.2)

        def hang(*_args: object, **_kwargs: object) -> None:
            release.wait(30)
            raise urllib.error.URLError("too late")

        monkeypatch.setattr(download.urllib.request, "urlopen", hang)
        assert "cannot be reached" in download.download("MNIST", tmp_path, show=True)
        release.set()

    @pytest.mark.parametrize("fail", [None, RuntimeError("Error downloading x\nTried y")])
    def test_success_is_none_and_a_failed_transfer_a_reason(
        self, monkeypatch, tmp_path, capfd, fail
    ):
        calls = self.torchvision(monkeypatch, fail)
        monkeypatch.setattr(download, "_reachable", lambda _mirrors: True)
        before = download.socket.getdefaulttimeout()
        problem = download.download("MNIST", tmp_path, show=False)
        assert calls[0] == tmp_path
        assert download.socket.getdefaulttimeout() == before
        assert capfd.readouterr() == ("", "")
        if fail is None:
            assert problem is None
        else:
            assert problem == f"the download to {tmp_path} failed (Error downloading x)"


def test_batches_keep_the_order_and_can_be_read_again():
    split = Split(torch.arange(10.0).reshape(5, 2), torch.arange(5))
    batches = Batches(split, 2)
    assert len(batches) == 3
    for _ in range(2):
        assert [y.tolist() for _, y in batches] == [[0, 1], [2, 3], [4]]
    assert next(iter(batches))[0].data_ptr() == split.inputs.data_ptr()
