"""What a loop has left out is said at the end of the task, and nothing where nothing was."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from quick_runs import QUICK, small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clext
from clext.methods import METHODS, make_method

AGAIN = "^clext: consolidate.. of this .* ends the task that the last call has ended already"
quiet = pytest.mark.filterwarnings("ignore:clext. (si|rwalk) saw no step")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(number=0):
    random = torch.Generator().manual_seed(number)
    return torch.rand(8, 4, generator=random), torch.arange(8) % 3


def loader(number=0):
    return DataLoader(TensorDataset(*data(number)), batch_size=4)


def said(call):
    """What is warned of, but for steps that left no trace."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(entry.message) for entry in caught if "saw no step" not in str(entry.message)]


class TestAnUpdateBeforeTheStep:
    """As course notebooks have it: what is a step's is taken for the next gradient's."""

    EARLY = "update.. of this .* was called before the optimizer's step"

    def steps(self, name, *, early, skip=False, clamp=False, **options):
        model = make_model()
        method = make_method(name, model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **options)
        x, y = data()
        for number in range(4):
            F.cross_entropy(model(x), y).backward()
            method.add_penalty_grad_()
            if early:
                method.update()
            if not (skip and number % 2):
                optimizer.step()
            if not early:
                method.update()
            optimizer.zero_grad()
            if clamp:
                with torch.no_grad():
                    model[0].weight.clamp_(-0.1, 0.1)

    @pytest.mark.parametrize("name", ["si", "rwalk"])
    @pytest.mark.parametrize("fused", [False, True])
    def test_is_noticed(self, name, fused):
        with pytest.warns(UserWarning, match=self.EARLY):
            self.steps(name, early=True, fused=fused)

    @pytest.mark.parametrize("name", ["si", "rwalk", "ewc"])
    @pytest.mark.parametrize("skip", [False, True])
    @pytest.mark.parametrize("clamp", [False, True])
    def test_nothing_is_said_of_the_right_order_nor_of_skipped_steps(self, name, skip, clamp):
        assert not said(lambda: self.steps(name, early=False, skip=skip, clamp=clamp))


class TestAModelThatChanged:
    """In a loop with an optimizer of torch and without `begin_task`."""

    NEW = "^clext: parameter '2.weight' .and 1 more. came into the model after this"

    def task(self, method, model, number):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = data(number)
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            method.add_penalty_grad_()
            optimizer.step()
            method.update()
            optimizer.zero_grad()
        method.consolidate([(x, y)])

    @pytest.mark.parametrize("name", ["ewc", "mas", "scp", "si", "rwalk", "gem", "agem"])
    def test_is_noticed_where_nobody_told_the_method(self, name):
        model = make_model()
        method = make_method(name, model)
        self.task(method, model, 0)
        model[2] = nn.Linear(5, 3)
        with pytest.warns(UserWarning, match=self.NEW):
            self.task(method, model, 1)
        assert not any("came into" in text for text in said(lambda: self.task(method, model, 2)))

    @pytest.mark.parametrize("name", ["ewc", "si", "gem"])
    @pytest.mark.parametrize("follow", ["begin_task", "refresh_parameters"])
    def test_nothing_is_said_where_the_method_was_told(self, name, follow):
        model = make_model()
        method = make_method(name, model)
        self.task(method, model, 0)
        model[2] = nn.Linear(5, 3)
        getattr(method, follow)()
        assert not said(lambda: self.task(method, model, 1))

    @pytest.mark.parametrize("name", ["ewc", "baseline", "replay"])
    def test_nothing_is_said_where_nothing_was_lost(self, name):
        model = make_model()
        method = make_method(name, model)
        model[2] = nn.Linear(5, 3)  # in the first task
        assert not any("came into" in text for text in said(lambda: self.task(method, model, 0)))


class TestTheSameEndAgain:
    @quiet
    @pytest.mark.filterwarnings("ignore:clext. loss.. of this dgr was not called")
    @pytest.mark.parametrize("name", [*METHODS, "ewc+replay", "gem+lwf"])
    @pytest.mark.parametrize("given", [lambda: [data()], lambda: loader()], ids=["list", "loader"])
    def test_is_noticed_in_every_method(self, name, given):
        method, task = make_method(name, make_model()), given()
        method.consolidate(task)
        with pytest.warns(UserWarning, match=AGAIN) as caught:
            method.consolidate(task)
        assert caught[0].filename == __file__
        assert len([entry for entry in caught if "saw no step" not in str(entry.message)]) == 1
        assert method.tasks == 2  # it is a warning

    def test_is_noticed_after_a_task_that_was_refused(self):
        method, task = make_method("ewc", make_model()), [data()]
        method.consolidate(task)
        with pytest.raises(ValueError, match="block"):
            method.begin_task(block=range(5, 2))
        with pytest.warns(UserWarning, match=AGAIN):
            method.consolidate(task)

    @pytest.mark.parametrize("name", ["baseline", "joint"])
    def test_is_noticed_without_data(self, name):
        method = make_method(name, make_model())
        method.consolidate()
        assert len(said(method.consolidate)) == 1

    @quiet
    @pytest.mark.parametrize("name", ["ewc", "mas", "gem", "baseline", "si"])
    @pytest.mark.parametrize(
        "between",
        [
            lambda method: method.begin_task(),
            lambda method: method.loss(*data()),
            lambda method: method.penalty(),
            lambda method: method.add_penalty_grad_(),
            lambda method: method.update(),
            lambda method: method.model[0].bias.data.add_(1e-4),
            lambda method: method.load_state_dict(method.state_dict()),
        ],
    )
    def test_is_another_one_after_anything_was_done(self, name, between):
        method, task = make_method(name, make_model()), [data()]
        method.consolidate(task)
        between(method)
        assert not [entry for entry in said(lambda: method.consolidate(task)) if "already" in entry]

    def test_is_another_one_after_a_fused_step_that_moves_nothing(self):
        method, task = clext.EWC(make_model()), [data()]
        optimizer = clext.optim.SGD(method.model.parameters(), lr=0.0, method=method)
        method.consolidate(task)
        F.cross_entropy(method.model(data()[0]), data()[1]).backward()
        optimizer.step()
        assert said(lambda: method.consolidate(task)) == []

    @pytest.mark.parametrize("fused", [False, True])
    def test_is_another_one_after_a_step_of_torchs_optimizers(self, fused):
        method, task = clext.Baseline(make_model()), [data()]
        optimizer = torch.optim.AdamW(method.model.parameters(), fused=fused)
        for _ in range(3):
            step(method, optimizer=optimizer)
            assert said(lambda: method.consolidate(task)) == []

    def test_of_a_model_that_has_learned_several_tasks_is_none(self):
        """Importances of each of them, without a step in between."""
        x, y = data()
        for tasks in (
            [loader(0), loader(1)],
            [[data(0)], [data(1)]],
            [[(x, y)], [(x, (y + 1) % 3)]],
            [iter([(x, y)]), iter([(x, y)])],
            [[(x, y), data(2)], [(x, y), data(3)]],
        ):
            method = clext.EWC(make_model())
            assert said(lambda m=method, t=tasks: [m.consolidate(entry) for entry in t]) == []

    def test_is_not_known_to_a_copy(self):
        method, task = clext.EWC(make_model()), [data()]
        method.consolidate(task)
        copied = pickle.loads(pickle.dumps(method))
        assert said(lambda: copied.consolidate(task)) == []

    def test_is_never_seen_in_a_run(self):
        options = {**QUICK, "epochs": 1, "lr": 1e-30}
        assert said(lambda: clext.train("ewc+replay", model=small(), **options)) == []

    def test_changes_nothing_where_warnings_are_errors(self):
        method, task = clext.EWC(make_model()), [data()]
        method.consolidate(task)
        before = {name: entry.clone() for name, entry in method.importance.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=AGAIN):
                method.consolidate(task)
        assert method.tasks == 1
        assert all(entry.equal(before[name]) for name, entry in method.importance.items())


LET_GO = "^clext: nothing of this .* was in the steps of this task"
PULLING = ["ewc", "mas", "scp", "si", "rwalk", "gem", "agem"]


def step(method, hold=None, optimizer=None):
    """A step of a loop of one's own, with an optimizer of torch unless told otherwise."""
    optimizer = optimizer or torch.optim.SGD(method.model.parameters(), lr=0.1)
    F.cross_entropy(method.model(data()[0]), data()[1]).backward()
    if hold is not None:
        hold(method)
    optimizer.step()
    if not method._attached and method.fused_state is not None:
        method.update()
    optimizer.zero_grad()


def second_task(name, hold=None, optimizer=None, **options):
    """What is said at the end of the second task, and the method."""
    method = make_method(name, make_model(), **options)
    step(method, optimizer=optimizer and optimizer(method))
    method.consolidate([data()])
    step(method, hold, optimizer and optimizer(method))
    return said(lambda: method.consolidate([data(1)])), method


class TestAPullThatWasLeftOut:
    @quiet
    @pytest.mark.parametrize("name", [*PULLING, "ewc+joint"])
    def test_is_noticed_from_the_second_task_on(self, name):
        messages, method = second_task(name)
        assert len(messages) == 1
        assert ("penalty() to the loss" in messages[0]) == (name not in ("gem", "agem"))
        step(method)
        with pytest.warns(UserWarning, match=LET_GO) as caught:
            method.consolidate([data(2)])
        assert caught[-1].filename == __file__

    @quiet
    @pytest.mark.parametrize("name", PULLING)
    @pytest.mark.parametrize("hold", ["add_penalty_grad_", "penalty"])
    def test_one_call_is_enough(self, name, hold):
        messages, _ = second_task(name, lambda method: getattr(method, hold)())
        # The penalty of GEM is zero, and projects nothing.
        assert len(messages) == (name in ("gem", "agem") and hold == "penalty")

    @pytest.mark.parametrize("name", PULLING)
    def test_is_not_missed_with_an_optimizer_that_has_the_method(self, name):
        def fused(method):
            return clext.optim.SGD(method.model.parameters(), lr=0.1, method=method)

        assert second_task(name, optimizer=fused)[0] == []

    @pytest.mark.parametrize(
        ("name", "options"),
        [("baseline", {}), ("ewc", {"strength": 0.0}), ("mas", {"strength": 0.0})],
    )
    def test_is_not_missed_where_there_is_none(self, name, options):
        assert second_task(name, **options)[0] == []

    def test_is_not_missed_while_nothing_moves(self):
        method = clext.EWC(make_model())
        assert said(lambda: [method.consolidate([data(k)]) for k in range(3)]) == []

    def test_is_not_missed_where_only_new_parameters_move(self):
        method, batch = clext.EWC(make_model()), data()
        method.model[0].requires_grad_(False)
        importance = dict(method.importance)
        method.consolidate([batch])
        assert not any(importance[name].any() for name in ("0.weight", "0.bias"))
        with torch.no_grad():
            method.model[0].weight += 1
        assert said(lambda: method.consolidate([data(1)])) == []

    @pytest.mark.parametrize("name", ["replay", "lwf", "icarl"])
    def test_of_the_loss_is_not_missed_while_nothing_moves(self, name):
        method = make_method(name, make_model())
        assert said(lambda: [method.consolidate([data(k)]) for k in range(3)]) == []

    @pytest.mark.parametrize("fused", [False, True])
    def test_is_noticed_with_torchs_fused_optimizers(self, fused):
        method = clext.EWC(make_model())
        optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1, fused=fused)
        step(method, optimizer=optimizer)
        method.consolidate([data()])
        step(method, optimizer=optimizer)
        with pytest.warns(UserWarning, match=LET_GO):
            method.consolidate([data(1)])

    def test_may_be_a_penalty_of_ones_own(self):
        method = clext.EWC(make_model())
        weights, anchor = method.importance, method.anchor  # views: got once
        for number in range(3):
            loss = sum(
                (weights[name] * (entry - anchor[name]).abs()).sum()
                for name, entry in method.model.named_parameters()
            )
            (loss + F.cross_entropy(method.model(data()[0]), data()[1])).backward()
            torch.optim.SGD(method.model.parameters(), lr=0.1).step()
            task = [data(number)]
            assert said(lambda task=task: method.consolidate(task)) == []

    def test_may_be_that_of_a_subclass(self):
        class Own(clext.EWC):
            def penalty(self):
                return sum(entry.square().sum() for entry in self.model.parameters())

        method = Own(make_model())
        for number in range(3):
            step(method)
            task = [data(number)]
            assert said(lambda task=task: method.consolidate(task)) == []
        assert not Own.keeps_by_pull
        assert clext.EWC.keeps_by_pull

    def test_nothing_is_known_of_the_task_that_was_stopped_in(self):
        method = clext.EWC(make_model())
        step(method)
        method.consolidate([data()])
        method.load_state_dict(method.state_dict())
        step(method)
        assert said(lambda: method.consolidate([data(1)])) == []

    @pytest.mark.parametrize("name", [*PULLING, "ewc+replay"])
    def test_is_never_missed_in_a_run(self, name):
        options = {**QUICK, "epochs": 1}
        assert said(lambda: clext.train(name, model=small(), **options)) == []

    def test_a_compiled_penalty_counts(self):
        method = clext.EWC(make_model())
        pull = torch.compile(method.penalty, backend="eager")
        for number in range(3):
            step(method, lambda _: pull().backward())
            task = [data(number)]
            assert said(lambda task=task: method.consolidate(task)) == []
