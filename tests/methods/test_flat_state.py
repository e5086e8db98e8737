"""A method's state as tensors alone, through safetensors and DCP, wrapped, attached or neither."""

from __future__ import annotations

import json

import pytest
import torch
from incremental_tasks import batches_for, begin, make_model, run_task, train
from toy_training import assert_same_state

from clext import EWC, METHODS, SI
from clext.methods import make_method

OPTIONS = {
    "replay": {"budget": 7, "policy": "balanced"},
    "der": {"budget": 7},
    "derpp": {"budget": 7},
    "er-ace": {"budget": 7},
    "icarl": {"budget": 7},
    "dgr": {"hidden": (8, 6), "latent": 3},
    "gem": {"per_task": 5},
    "agem": {"per_task": 5, "batch": 4},
    "ewc+replay": {"budget": 7},
}


def make(name, **options):
    return make_method(name, make_model(**options), **OPTIONS.get(name, {}))


def files(flat, path):
    """The same from a file of safetensors."""
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(flat, path)
    return safetensors.load_file(path)


@pytest.mark.parametrize("name", [*METHODS, "ewc+replay"])
def test_all_of_it_goes_through_a_file_of_tensors(name, tmp_path):
    method, other = make(name), make(name)
    run_task(method, "class", 0)
    train(method, begin(method, "class", 1))
    flat = files(method.flat_state_dict(), tmp_path / "state.safetensors")
    assert all(entry.is_contiguous() for entry in flat.values())
    other.model.load_state_dict(method.model.state_dict())
    other.load_flat_state_dict(flat)
    assert_same_state(other.state_dict(), method.state_dict())
    other.consolidate(batches_for(other, "class", 1))


@pytest.mark.parametrize("name", ["replay", "gem"])
def test_examples_that_are_mappings(name, tmp_path):
    options = {
        **OPTIONS[name],
        "forward": lambda model, batch: model(batch["x"]),
        "labels": lambda batch: batch["y"],
    }
    method, other = (METHODS[name](make_model(), **options) for _ in range(2))
    method.consolidate([{"x": x, "y": y} for x, y in batches_for(method, "class", 0)])
    other.load_flat_state_dict(files(method.flat_state_dict(), tmp_path / "state"))
    assert_same_state(other.state_dict(), method.state_dict())


def test_the_state_of_a_parameter_has_a_name_of_its_own():
    method = SI(make_model())
    run_task(method, "class", 0)
    flat = method.flat_state_dict()
    names = [name for name, _ in method.model.named_parameters()]
    keys = [f"{key}.{name}" for key in ("anchor", "importance", "path") for name in names]
    assert [*flat] == [*keys, "json"]
    assert torch.equal(flat["importance.2.bias"], method.importance["2.bias"])
    assert json.loads(bytes(flat["json"].tolist()))  # anybody can read it


def test_channels_last_is_written_in_order_and_read_back_in_place(tmp_path):
    layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    method, other = (EWC(layer, state_dtype=torch.bfloat16) for _ in range(2))
    method.importance["weight"] = torch.rand(4, 3, 3, 3)
    other.load_flat_state_dict(files(method.flat_state_dict(), tmp_path / "state"))
    assert other.importance["weight"].stride() == layer.weight.stride()
    assert torch.equal(other.importance["weight"], method.importance["weight"])


def test_the_keys_are_the_same_attached_compiled_or_wrapped():
    model = make_model()
    flat = SI(model).flat_state_dict()
    attached = SI(model)
    attached.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped = torch.nn.Module()
    wrapped.module = model
    for method in (attached, SI(torch.compile(model)), SI(wrapped)):
        assert method.flat_state_dict().keys() == flat.keys()
        method.load_flat_state_dict(flat)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._fsdp_wrapped_module."]
)
def test_prefixes_of_wrappers_are_stripped(prefix):
    method, other = SI(make_model()), SI(make_model())
    run_task(method, "class", 0)
    flat = {
        key if key == "json" else key.replace(".", f".{prefix}", 1): entry
        for key, entry in method.flat_state_dict().items()
    }
    other.load_flat_state_dict(flat)
    assert_same_state(other.state_dict(), method.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about a single process
def test_torchs_checkpoint_reads_it_into_another_methods_tensors(tmp_path):
    """Which has counted other things: as many bytes are to be read as there is room."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    method, other = EWC(make_model(), strength=12.5), EWC(make_model())
    run_task(method, "class", 0)
    checkpoint.save(method.flat_state_dict(), checkpoint_id=tmp_path)
    flat = other.flat_state_dict()
    checkpoint.load(flat, checkpoint_id=tmp_path)
    other.load_flat_state_dict(flat)
    assert_same_state(other.state_dict(), method.state_dict())


def test_what_is_missing_is_said_and_nothing_is_changed():
    method = EWC(make_model())
    before, flat = method.state_dict(), SI(make_model()).flat_state_dict()
    lacks = {
        key: entry for key, entry in method.flat_state_dict().items() if key != "anchor.0.bias"
    }
    for given, message in (
        (flat, "it is of method 'si', not 'ewc'"),
        (lacks, "'anchor' is of other parameters: 0.bias"),
        ({}, "the flat state has no 'json'; expected what flat_state_dict.. returned"),
    ):
        with pytest.raises(ValueError, match=message):
            method.load_flat_state_dict(given)
    assert_same_state(method.state_dict(), before)
