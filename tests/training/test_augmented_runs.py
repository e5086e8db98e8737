"""Runs with random transforms: what is transformed, what is not, and the same bits again."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from quick_runs import QUICK, SPLIT, same, small, weights
from torch import Tensor, nn

import clext

PLAIN = 2.0  # pixels of the digits are below; what was moved is above


def moved(example: Tensor) -> Tensor:
    """One random number for each call, added to all pixels: 10 to 11."""
    return example + 10 + torch.rand(())


class Watched(nn.Module):
    """Keeps what it was called with, in train and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()
        self.seen: Mapping[bool, list[Tensor]] = {True: [], False: []}

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen[self.training].append(inputs.detach().clone())
        return self.inner(inputs)


def trained(method: str, **options: Any) -> tuple[Watched, clext.Result]:
    model = Watched()
    return model, clext.train(method, model=model, **{**QUICK, "tasks": 1, **options})


def drawn(batches: list[Tensor]) -> list[float]:
    """The number that was added to each example; corners of the digits are black."""
    return torch.cat(batches).amin(dim=1).sub(10).tolist()


@pytest.mark.parametrize("method", ["baseline", "ewc", "mas", "lwf", "gem", "icarl"])
def test_what_is_trained_on_is_drawn_anew_and_the_rest_is_plain(method):
    model, result = trained(method, transform=moved)
    numbers = drawn(model.seen[True])
    assert len(numbers) >= 2 * result.config["data"]["train"]
    assert 0 <= min(numbers) < 0.1
    assert 0.9 < max(numbers) <= 1
    # float32 has few numbers between 10 and 11: some are drawn twice.
    assert len(set(numbers)) > 0.99 * len(numbers)
    assert max(batch.max() for batch in model.seen[False]) < PLAIN


def test_replayed_examples_are_transformed_and_kept_plain():
    method = clext.Replay(Watched(), budget=50)
    clext.train(method, transform=moved, **SPLIT)
    assert min(batch.min() for batch in method.model.seen[True]) >= 10
    kept = [entry for entry in method.flat_state_dict().values() if entry.shape == (50, 64)]
    assert len(kept) == 1
    assert kept[0].max() < PLAIN


class TestSeeds:
    def test_the_same_seed_draws_the_same(self):
        models = [trained("ewc", transform=moved, seed=seed)[0] for seed in (0, 0, 1)]
        first, again, other = (weights(model) for model in models)
        assert same(first, again)
        assert not same(first, other)

    def test_the_global_state_is_as_it_was(self):
        before = torch.get_rng_state()
        clext.train("baseline", transform=moved, **{**QUICK, "tasks": 1, "epochs": 1})
        assert torch.get_rng_state().equal(before)

    def test_a_run_goes_on_to_the_same_bits(self, tmp_path):
        class Crash(clext.Callback):
            def on_step(self, training: Any) -> None:
                if training.total_steps == 8:
                    raise KeyboardInterrupt

        options = {"transform": moved, "epochs": 1, "checkpoint_every": 5, "out": tmp_path}
        with pytest.raises(KeyboardInterrupt):
            trained("ewc", callbacks=[Crash()], **options)
        resumed, _ = trained("ewc", resume=True, **options)
        assert same(weights(resumed), weights(trained("ewc", transform=moved, epochs=1)[0]))

    def test_a_sweep_in_processes_draws_what_one_run_does(self, tmp_path):
        options = {**QUICK, "tasks": 1, "epochs": 1, "transform": nn.Dropout(0.2)}
        sweep = clext.sweep("baseline", seeds=[0, 1], n_jobs=2, out=tmp_path / "out", **options)
        for seed in (0, 1):
            alone = clext.train("baseline", seed=seed, **options)
            assert sweep.results["baseline", None, seed].accuracy.tolist() == (
                alone.accuracy.tolist()
            )


def test_a_batch_transform_gets_the_batch():
    sizes = []

    def batch_transform(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch

    trained("baseline", batch_transform=batch_transform, batch_size=100, epochs=1)
    assert sizes[:3] == [2, 100, 100]  # first the two that it is tried on


class TestDoor:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"transform": "crop-flop"}, "option 'transform' of train: 'crop-flop'"),
            ({"batch_transform": "crop-flip"}, "batch_transform must be a function of a batch"),
            ({"transform": "crop-flip"}, r"must keep .*crop-flip.* \[C, H, W\], got \[64\]"),
            ({"transform": lambda x: x[:32]}, r"float32 \[2, 64\], got torch.float32 \[2, 32\]"),
            ({"transform": Tensor.double}, r"got torch.float64 \[2, 64\]; evaluation shows"),
        ],
    )
    def test_what_is_no_transform(self, options, message):
        with pytest.raises(ValueError, match=message):
            trained("baseline", **options)

    def test_a_result_says_what_it_was(self):
        _, result = trained("baseline", transform=moved, epochs=1)
        assert result.config["transform"] == "moved"
        assert result.config["batch_transform"] is None
