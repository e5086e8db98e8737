"""Models by name: what they take, what they are, and whose random numbers draw them."""

import sys

import pytest
import torch

import clext
from clext.core.names import MODELS
from clext.training import runs
from clext.training.models import named_model

QUICK = {"dataset": "digits", "tasks": 2, "epochs": 1, "progress": False}
LIBRARIES = {"resnet18": "torchvision", "vit_tiny": "timm"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(784,), (3, 32, 32)])
def test_the_seed_alone_draws_the_weights(name, shape):
    pytest.importorskip(LIBRARIES.get(name, "torch"))
    before = torch.get_rng_state()
    first, again, other = (named_model(name, shape, 7, seed).eval() for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    x = torch.rand(2, *shape)
    assert first(x).shape == (2, 7)
    assert first(x).equal(again(x))
    assert not first(x).equal(other(x))


def test_resnet18_is_the_one_for_small_images():
    pytest.importorskip("torchvision")
    model = named_model("resnet18", (3, 32, 32), 10, 0)
    # As the field counts it: 11,689,512 of ImageNet's, less 487 * 7 of its convolution and head.
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    sizes = []
    for layer in (model[0].conv1, model[0].maxpool, model[0].layer1, model[0].layer4):
        layer.register_forward_hook(lambda _module, _inputs, out: sizes.append(out.shape[1:]))
    model.eval()(torch.rand(1, 3, 32, 32))
    assert sizes == [(64, 32, 32), (64, 32, 32), (64, 32, 32), (512, 4, 4)]


def test_mlp_is_the_default_and_takes_other_widths():
    named, default = (clext.train("si", **QUICK, **given) for given in ({"model": "mlp"}, {}))
    assert (named.accuracy[1] == default.accuracy[1]).all()
    assert named.config["model"] == default.config["model"] == "MLP 64-1024-512-256-10"
    assert clext.train("si", model="mlp-20-30", **QUICK).config["model"] == "MLP 64-20-30-10"


def test_every_way_to_run_takes_a_name(tmp_path):
    assert clext.train("ewc", model="cnn", **QUICK).config["model"] == "cnn"
    compared = clext.compare(["ewc", "icarl"], model="cnn", **QUICK)
    assert {result.config["model"] for result in compared.results.values()} == {"cnn"}
    for _ in range(2):  # the second time it is all there
        sweep = clext.sweep(["si"], model="cnn", seeds=[0], out=tmp_path, **QUICK)
    assert [result.config["model"] for result in sweep.results.values()] == ["cnn"]


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("resnet-18", r"unknown model 'resnet-18'; did you mean 'resnet18'"),
            ("mlp-0", "unknown model 'mlp-0'"),
            ("mlp-", "unknown model 'mlp-'"),
            (3, r"must be a torch.nn.Module or a name \(mlp, cnn, resnet18, vit_tiny\), got int"),
        ],
    )
    def test_a_wrong_name_before_the_data_is_loaded(self, model, message, monkeypatch):
        monkeypatch.setattr(runs, "load_dataset", lambda *_a, **_k: pytest.fail("work"))
        with pytest.raises(ValueError, match=message):
            clext.train("ewc", model=model, **QUICK)

    @pytest.mark.parametrize(("model", "library"), LIBRARIES.items())
    def test_a_missing_library_with_the_line_that_installs_it(self, model, library, monkeypatch):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=rf"'{model}' needs {library}, .*pip install"):
            clext.train("ewc", model=model, **QUICK)

    def test_vectors_that_are_no_images(self):
        pairs = [((torch.rand(8, 20), torch.arange(8) % 2),) * 2]
        scenario = clext.Scenario.from_datasets(pairs)
        with pytest.raises(ValueError, match=r"'cnn' takes images .* got examples of shape \[20\]"):
            clext.train("ewc", model="cnn", scenario=scenario, progress=False)

    def test_a_name_beside_a_method_that_has_a_model(self):
        method = clext.EWC(torch.nn.Linear(64, 10))
        with pytest.raises(ValueError, match="model='cnn', but the given method has a model"):
            clext.train(method, model="cnn", **QUICK)
