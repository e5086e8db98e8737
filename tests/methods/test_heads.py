"""Which outputs of a model count: the hook, losses over tasks, importance, and predictions."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clext
from clext.data.scenarios import make_scenario
from clext.methods.parts.heads import Outputs
from clext.training.evaluate import Evaluator
from clext.training.loop import begin_task


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6)).double()


def examples(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1)).double()


class TestSelection:
    def test_the_model_returns_the_active_outputs_alone(self, model):
        x = examples()
        full = model(x)
        outputs = Outputs(model)
        outputs.select(range(2, 5))
        assert model(x).equal(full[:, 2:5])
        with outputs.full():
            assert model(x).equal(full)
        with outputs.selected(range(1)):
            assert model(x).shape == (9, 1)
        assert model(x).shape == (9, 3)
        outputs.select(None)
        assert model(x).equal(full)
        assert not model._forward_hooks

    def test_the_selection_comes_back_after_an_error(self, model):
        outputs = Outputs(model)
        outputs.select(range(2))
        with pytest.raises(KeyError), outputs.selected(range(3)), outputs.full():
            raise KeyError
        assert model(examples()).shape == (9, 2)

    def test_training_leaves_no_hook_behind(self):
        model = nn.Linear(64, 10)
        options = {"dataset": "digits", "scenario": "split", "epochs": 1, "progress": False}
        clext.train("baseline", model=model, incremental="class", **options)
        assert not model._forward_hooks
        assert model(torch.zeros(1, 64)).shape == (1, 10)


class TestLossOverTasks:
    """Each example against the outputs that compete with its class, one example at a time."""

    def expected(self, model, x, labels, rivals):
        losses = []
        for entry, label in zip(x, labels.tolist(), strict=True):
            logits = model(entry[None])[0]
            among = rivals(label)
            losses.append(torch.logsumexp(logits[among], 0) - logits[label])
        return torch.stack(losses).mean()

    def test_a_head_for_each_task(self, model):
        x, labels = examples(6), torch.tensor([0, 5, 2, 3, 1, 4])
        blocks = [range(2), range(2, 3), range(3, 6)]
        expected = self.expected(
            model, x, labels, lambda label: next([*b] for b in blocks if label in b)
        )
        outputs = Outputs(model)
        for ended, block in enumerate(blocks):
            outputs.begin_task(block, block, ended=ended)
        torch.testing.assert_close(outputs.cross_entropy(x, labels), expected)

    def test_a_head_that_grows(self, model):
        x, labels = examples(4), torch.tensor([0, 3, 2, 1])
        expected = self.expected(model, x, labels, lambda _label: [0, 1, 2, 3])
        outputs = Outputs(model)
        outputs.begin_task(range(2), range(2), ended=0)
        outputs.begin_task(range(2, 4), range(4), ended=1)
        torch.testing.assert_close(outputs.cross_entropy(x, labels), expected)

    def test_one_head(self, model):
        x, labels = examples(4), torch.tensor([0, 5, 2, 1])
        outputs = Outputs(model)
        outputs.begin_task(range(6), None, ended=0)
        torch.testing.assert_close(
            outputs.cross_entropy(x, labels), F.cross_entropy(model(x), labels)
        )


class TestMethods:
    def test_importance_is_of_the_active_outputs_and_needs_no_fallback(self, model):
        x, labels = examples(), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0])
        method = clext.EWC(model)
        method.begin_task(block=range(2, 4), active=range(2, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            method.consolidate([(x, labels)])
        squares = torch.zeros_like(model[2].weight)
        for entry, label in zip(x, labels, strict=True):
            loss = F.cross_entropy(model(entry[None]), label[None])
            squares += torch.autograd.grad(loss, model[2].weight)[0] ** 2
        torch.testing.assert_close(method.importance["2.weight"], squares / len(x))
        assert bool(squares[2:4].any())
        assert not bool(method.importance["2.weight"][[0, 1, 4, 5]].any())

    @pytest.mark.parametrize("incremental", ["task", "class"])
    def test_the_examiner_counts_by_hand(self, incremental):
        torch.manual_seed(0)
        model = nn.Linear(64, 10)
        method = clext.Baseline(model)
        data = clext.data.datasets.load_dataset("digits", show=False)
        scenario = make_scenario("split", data, 5, 0, incremental)
        for k in range(3):
            begin_task(method, scenario, k)
        accuracies = Evaluator(method, scenario).accuracies(2)
        method.outputs.select(None)
        for k, accuracy in enumerate(accuracies):
            test = scenario.tasks[k].test()
            among = range(2 * k, 2 * k + 2) if incremental == "task" else range(6)
            logits = model(test.inputs)[:, list(among)]
            right = logits.argmax(1) + among[0] == test.labels
            assert accuracy == right.double().mean().item()

    def test_a_beginning_that_fails_leaves_the_outputs_as_they_were(self, model):
        class Refuses(clext.Baseline):
            name = "refuses"

            def _begin_task(self, examples):
                raise ValueError(f"no, not {len(examples)}")

        method = Refuses(model)
        method.outputs.begin_task(range(2), range(2), ended=0)
        data = (examples(), torch.full((9,), 2))
        with pytest.raises(ValueError, match="no"):
            method.begin_task(data, block=range(2, 4), active=range(4))
        assert method.outputs.blocks == [range(2)]
        assert model(examples()).shape == (9, 2)

    def test_outputs_are_in_the_state(self, model):
        method = clext.EWC(model)
        method.begin_task(block=range(2), active=range(2))
        method.consolidate([(examples(), torch.zeros(9, dtype=torch.int64))])
        method.begin_task(block=range(2, 4), active=range(4))
        other = clext.EWC(copy.deepcopy(model))
        assert other.model(examples()).shape == (9, 6)
        other.load_state_dict(method.state_dict())
        assert other.outputs.blocks == [range(2), range(2, 4)]
        assert other.model(examples()).shape == (9, 4)

    @pytest.mark.parametrize(
        "given",
        [
            None,
            3,
            {"blocks": 3, "active": None},
            *({"blocks": [pair], "active": None} for pair in ([0], [2, 1], [0, 1.5], [-1, 2])),
            {"blocks": [[0, 2]], "active": [2, 0]},
        ],
    )
    def test_outputs_that_are_none_are_refused(self, model, given):
        method = clext.EWC(model)
        state = {**method.state_dict(), "outputs": given, "strength": 7.0}
        with pytest.raises(ValueError, match=r"ewc: state_dict\['outputs'\] is"):
            method.load_state_dict(state)
        assert method.strength == clext.EWC.default_strength

    def test_a_task_begun_again_takes_its_own_place(self, model):
        method = clext.Baseline(model)
        for k in range(3):
            for _ in range(2):
                method.begin_task(block=range(2 * k, 2 * k + 2), active=range(2 * k, 2 * k + 2))
            method.consolidate()
        assert method.outputs.blocks == [range(2), range(2, 4), range(4, 6)]

    @pytest.mark.parametrize(
        ("block", "active", "message"),
        [
            ([0, 1], None, r"block must be a range of outputs.* got \[0, 1\]"),
            (range(2), [0, 1], "active must be a range"),
            (range(0, 4, 2), None, "block must be a range"),
            (range(4, 2), None, "block must be a range"),
            (range(-2, 0), None, "block must be a range"),
            (None, range(2), "needs block"),
            (range(2, 4), range(2), "is not within active"),
        ],
    )
    def test_ranges_that_are_none_are_refused(self, model, block, active, message):
        method = clext.Baseline(model)
        with pytest.raises(ValueError, match=message):
            method.begin_task(block=block, active=active)
        assert method.outputs.blocks == []
        assert model(examples()).shape == (9, 6)

    def test_outputs_that_the_model_has_not(self, model):
        clext.Baseline(model).begin_task(block=range(2), active=range(2))
        method = clext.Baseline(model)  # the one before is gone
        method.begin_task(block=range(4, 8), active=range(4, 8))
        with pytest.raises(ValueError, match=r"logits \[N, >= 8\], got \[9, 6\]"):
            model(examples())

    @pytest.mark.parametrize("name", clext.METHODS)
    def test_the_first_loss_says_which_outputs_the_model_has_not(self, name, model):
        method = clext.METHODS[name](model)
        data = (examples().sigmoid(), torch.full((9,), 6))
        with pytest.raises(ValueError, match=r"^outputs 0 to 7 .*\[N, >= 8\], got \["):
            method.loss(*method.begin_task(data, block=range(6, 8), active=range(8)))

    def test_heads_are_said_from_the_first_task_on(self, model):
        method = clext.Baseline(model)
        method.consolidate()
        with pytest.raises(ValueError, match="of 1 earlier tasks 0 were begun with a block"):
            method.begin_task(block=range(2), active=range(2))

    def test_two_methods_do_not_narrow_one_model(self, model):
        first, second = clext.EWC(model), clext.Baseline(model)
        first.begin_task(block=range(2), active=range(2))
        with pytest.raises(ValueError, match="selected by another method already"):
            second.begin_task(block=range(2, 4), active=range(2, 4))
        assert second.outputs.blocks == []
        first.begin_task()
        second.begin_task(block=range(2, 4), active=range(2, 4))
        assert model(examples()).shape == (9, 2)

    def test_a_method_that_is_gone_leaves_the_model_as_it_was(self, model):
        method = clext.EWC(model)
        method.begin_task(block=range(2), active=range(2))
        copied = copy.deepcopy(model)
        assert copied(examples()).shape == (9, 6)
        del method
        gc.collect()
        assert model(examples()).shape == (9, 6)
        assert not model._forward_hooks

    @pytest.mark.parametrize("name", ["ewc", "replay", "lwf", "icarl", "gem"])
    @pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
    def test_labels_outside_the_active_outputs(self, name, labels):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4))
        method = clext.METHODS[name](model)
        x, y = torch.rand(2, 5), torch.tensor([0, 1])
        method.begin_task(block=range(2), active=range(2))
        method.consolidate([(x, y)])
        method.begin_task(block=range(2, 4), active=range(2, 4))
        with pytest.raises(ValueError, match=r"labels reach from .* expected 0 to 1: they count"):
            method.loss(x, torch.tensor(labels))

    @pytest.mark.filterwarnings("ignore:clext. .* saw no step")
    @pytest.mark.parametrize("name", [name for name in clext.METHODS if name != "baseline"])
    def test_labels_of_a_head_of_its_own_are_not_those_of_a_growing_head(self, name):
        """The likeliest slip: they count from 0 where each task has a head."""
        torch.manual_seed(0)
        method = clext.METHODS[name](nn.Sequential(nn.Linear(5, 4)))
        x, y = torch.rand(2, 5), torch.tensor([0, 1])
        method.begin_task((x, y), block=range(2), active=range(2))
        method.consolidate([(x, y)])
        message = "from 0 to 1, expected 2 to 3: .* count from the first active output"
        with pytest.raises(ValueError, match=f"^{name}: labels reach {message}"):
            method.begin_task((x, y), block=range(2, 4), active=range(4))
        assert method.outputs.blocks == [range(2)]
        method.begin_task(block=range(2, 4), active=range(4))
        if name in ("replay", "gem", "agem", "icarl"):  # who reads the examples
            with pytest.raises(ValueError, match=message):
                method.consolidate([(x, y)])
            assert method.tasks == 1
        method.begin_task((x, y + 2), block=range(2, 4), active=range(4))
        method.begin_task((x, y), block=range(2, 4), active=range(2, 4))

    @pytest.mark.parametrize("name", ["ewc", "icarl"])
    def test_a_prediction_by_outputs_that_the_model_has_not(self, name):
        method = clext.METHODS[name](nn.Sequential(nn.Linear(5, 4)))
        x, y = torch.rand(2, 5), torch.tensor([0, 1])
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"^outputs 0 to 8 are .*\[N, >= 9\], got \[2, 4\]"
            ):
                method.predict(x, active=range(9))
            method.consolidate([(x + method.tasks, y)])  # another task each time

    def test_an_earlier_head_predicts(self, model):
        full = model(examples())
        method = clext.Baseline(model)
        method.begin_task(block=range(2), active=range(2))
        method.consolidate()
        method.begin_task(block=range(2, 5), active=range(2, 5))
        assert method.predict(examples(), active=range(2)).equal(full[:, :2])
        assert method.predict(examples()).equal(full[:, 2:5])
