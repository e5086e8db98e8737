"""Two methods on one model: the penalty of one, the loss of the other."""

from __future__ import annotations

import copy
import itertools
import re
import warnings

import pytest
import torch
from quick_runs import QUICK, same, small, weights
from torch import nn
from toy_training import assert_same_state

import clext
from clext.methods import METHODS, make_method

REHEARSALS = [name for name, kind in METHODS.items() if kind.learns_otherwise()]
PROTECTORS = [name for name in METHODS if name not in REHEARSALS]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(8, 4, generator=random), torch.randint(3, (8,), generator=random))
        for _ in range(3)
    ]


class TestNames:
    @pytest.mark.parametrize("given", ["ewc+replay", ["replay", "ewc"], "ewc + replay "])
    def test_two_names_in_any_order(self, given):
        method = make_method(given, model(), strength=3.0, budget=7, fisher="exact", seed=5)
        assert method.label == "ewc+replay"
        ewc, replay = method.parts
        assert isinstance(ewc, clext.EWC)
        assert isinstance(replay, clext.Replay)
        assert (ewc.strength, ewc.fisher, ewc.seed) == (3.0, "exact", 5)
        assert (replay.strength, replay.budget, replay.seed) == (1.0, 7, 5)

    def test_an_option_with_the_name_of_a_part_goes_there_alone(self):
        options = {"replay.strength": 3, "seed": 5, "replay.seed": 6, "ewc.gamma": 0.5}
        ewc, replay = make_method("replay+ewc", model(), strength=7.0, **options).parts
        assert (ewc.strength, ewc.gamma, ewc.seed) == (7.0, 0.5, 5)
        assert (replay.strength, replay.seed) == (3.0, 6)
        ewc, replay = make_method("ewc+replay", model(), strength=7.0, **{"ewc.strength": 2}).parts
        assert (ewc.strength, replay.strength) == (2.0, 1.0)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("reply.strength", "unknown part of ewc.replay in option 'reply.*mean 'replay'"),
            ("si.xi", "unknown part of ewc.replay in option 'si.xi'"),
            ("replay.gamma", "unknown option of replay 'gamma'"),
            ("replay.budgt", "unknown option of replay 'budgt'; did you mean 'budget'"),
            ("gama", "unknown option, neither of train nor of ewc.replay: 'gama';.*mean 'gamma'"),
        ],
    )
    def test_an_option_of_no_part(self, option, message):
        with pytest.raises(ValueError, match=message):
            clext.train("ewc+replay", **{**QUICK, option: 1.0})

    @pytest.mark.parametrize("pair", [*itertools.product(PROTECTORS, REHEARSALS)], ids="+".join)
    def test_every_pair_of_both_kinds(self, pair):
        assert make_method("+".join(pair), model()).label == "+".join(pair)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("ewc+si", "ewc does not combine with si"),
            ("replay+lwf", "replay does not combine with lwf|lwf does not combine with replay"),
            ("ewc+ewc", "ewc does not combine with ewc"),
            ("ewc+replai", "unknown method 'replai'.*'replay'"),
            ("ewc+", "method: a name is missing in 'ewc.'; expected one,"),
            (["ewc", ""], "a name is missing in .*'ewc.replay'$"),
            ("", "method: a name is missing in ''"),
            ("ewc, replay", "unknown method 'ewc, replay'; to combine the two write 'ewc.replay'$"),
            ("ewc replai", "unknown method 'ewc replai'; did you mean 'replay'"),
            (["ewc", "replay", "lwf"], "expected one name or two to combine, got 3"),
            ([], "expected one name or two to combine, got 0"),
            ([3], "unknown method 3"),
            (clext.EWC, "^method: expected a name .*, or an instance, got the class EWC$"),
            (3, "^method: expected a name .*, or an instance, got int$"),
        ],
    )
    def test_names_that_do_not_combine(self, given, message):
        with pytest.raises(ValueError, match=message):
            make_method(given, model())

    def test_an_option_that_neither_has(self):
        with pytest.raises(ValueError, match=r"option of ewc\+replay.*'bugdet'.*'budget'"):
            make_method("ewc+replay", model(), bugdet=3)


class TestCombining:
    @pytest.mark.parametrize("given", ["replay", clext.Replay, None])
    def test_with_what_is_no_method(self, given):
        message = r"^ewc: combine expects a method .* combine\(clext.Replay\(model\)\), got .+$"
        with pytest.raises(ValueError, match=message):
            clext.EWC(model()).combine(given)

    def test_both_parts_are_shown(self):
        one = model()
        method = clext.EWC(one, gamma=0.5).combine(clext.Replay(one, budget=7))
        assert re.fullmatch(r"EWC\(.*gamma=0.5.*\) \+ Replay\(.*budget=7.*\)", repr(method))

    def test_of_two_models(self):
        with pytest.raises(ValueError, match="replay was made for another model"):
            clext.EWC(model()).combine(clext.Replay(model()))

    def test_twice(self):
        one = model()
        method = clext.EWC(one).combine(clext.Replay(one))
        with pytest.raises(ValueError, match=r"ewc\+replay: is a combination already"):
            method.combine(clext.LwF(one))
        assert method.label == "ewc+replay"

    def test_a_part_is_taken(self):
        """Used alone it would do half of the work, or undo that of the first combination."""
        one = model()
        replay = clext.Replay(one)
        method = clext.EWC(one).combine(replay)
        with pytest.raises(ValueError, match="^replay: is part of a combination already"):
            clext.SI(one).combine(replay)
        x, y = batches(0)[0]
        for call in (
            lambda: replay.begin_task((x, y)),
            lambda: replay.loss(x, y),
            lambda: replay.consolidate([(x, y)]),
            lambda: clext.optim.Adam(one.parameters(), method=replay),
        ):
            with pytest.raises(RuntimeError, match="^replay: .* part of a combination; use the"):
                call()
        assert [part.tasks for part in method.parts] == [0, 0]
        method.consolidate([(x, y)])
        assert [part.tasks for part in method.parts] == [1, 1]

    def test_an_optimizer_counts_the_steps_of_both(self):
        class Counting(clext.Replay):
            count = 0

            def after_step(self):
                self.count += 1

        one = model()
        replay = Counting(one)
        optimizer = clext.optim.SGD(one.parameters(), lr=0.1, method=clext.EWC(one).combine(replay))
        for number in (1, 2):
            optimizer.step()
            assert replay.count == number

    def test_the_loop_sees_the_loss_of_one_and_the_penalty_of_the_other(self):
        """Against the two apart on a copy, their gradients added by hand."""
        together, apart = model(), model()
        method = clext.EWC(together, strength=5.0).combine(clext.Replay(together, seed=3))
        ewc, replay = clext.EWC(apart, strength=5.0), clext.Replay(apart, seed=3)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (together, apart)]
        for task in range(3):
            method.begin_task()
            replay.begin_task()
            for x, y in batches(task):
                method.loss(x, y).backward()
                method.add_penalty_grad_()
                (replay.loss(x, y) + ewc.penalty()).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                method.update()
            method.consolidate(batches(task))
            ewc.consolidate(batches(task))
            replay.consolidate(batches(task))
        for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert [part.tasks for part in method.parts] == [3, 3]

    def test_both_follow_a_change_of_the_model(self):
        one = model()
        method = clext.EWC(one).combine(clext.ICaRL(one))
        one[0], one[2] = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()
        method.refresh_parameters()
        for part in method.parts:
            pairs = zip(part._state.params, one.parameters(), strict=True)
            assert all(known is given for known, given in pairs)
        inputs, labels = batches(0)[0]
        targets = method.begin_task((inputs.double(), labels))[2]
        assert targets.dtype == torch.float64

    def test_batches_that_can_be_read_once_serve_both(self):
        one = model()
        method = clext.EWC(one).combine(clext.Replay(one))
        method.begin_task()
        method.consolidate(iter(batches(0)))
        twin = copy.deepcopy(one)
        alone = clext.EWC(twin)
        alone.consolidate(batches(0))
        assert method.importance["0.weight"].equal(alone.importance["0.weight"])
        assert bool(method.importance["0.weight"].any())

    @pytest.mark.parametrize("once", [False, True])
    @pytest.mark.parametrize("name", ["replay", "icarl", "gem", "agem", "ewc+replay"])
    def test_a_loader_may_use_its_tensors_again(self, name, once):
        def reusing():
            x, y = (torch.empty_like(entry) for entry in batches(0)[0])
            for inputs, labels in batches(0):
                yield x.copy_(inputs), y.copy_(labels)
            x.fill_(9)
            y.fill_(0)

        class Loader:
            def __iter__(self):
                return reusing()

        methods = [make_method(name, model()) for _ in range(2)]
        loaders = batches(0), reusing() if once else Loader()
        for method, data in zip(methods, loaders, strict=True):
            method.begin_task()
            method.consolidate(data)
        assert_same_state(methods[0].state_dict(), methods[1].state_dict())

    def test_an_end_that_one_refuses_changes_neither(self):
        one = model()
        method = clext.SI(one).combine(clext.Replay(one))
        optimizer = clext.optim.SGD(one.parameters(), lr=0.1, method=method)
        method.begin_task()
        method.loss(*batches(0)[0]).backward()
        optimizer.step()
        before = method.state_dict()
        method._state.lists["path"][0].fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN"):
            method.consolidate(batches(0))
        assert method.parts[1].state_dict()["extra"].keys() == before["rehearsal"]["extra"].keys()
        assert [part.tasks for part in method.parts] == [0, 0]

    def test_a_state_of_the_pair_resumes_and_that_of_one_alone_is_refused(self):
        def trained(method: clext.Method) -> None:
            optimizer = clext.optim.Adam(method.model.parameters(), method=method)
            for task in range(2):
                method.begin_task()
                for x, y in batches(task + 10 * method.tasks):
                    method.loss(x, y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                method.consolidate(batches(task))

        one, two = model(), model()
        method = clext.SI(one).combine(clext.Replay(one, seed=1))
        trained(method)
        two.load_state_dict(one.state_dict())
        resumed = clext.SI(two).combine(clext.Replay(two, seed=1))
        resumed.load_state_dict(method.state_dict())
        trained(method)
        trained(resumed)
        for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
            assert ours.equal(theirs)
        with pytest.raises(
            ValueError, match="si: state_dict is of si alone, and this is si.replay"
        ):
            resumed.load_state_dict(clext.SI(two).state_dict())
        with pytest.raises(ValueError, match="of si in a combination, and this is si"):
            clext.SI(two).load_state_dict(method.state_dict())


class TestALossOfOnesOwn:
    """In a later task it is in place of the one by which a method remembers."""

    MESSAGE = "^clext: loss.. of this .* was not called in this task, so .* kept nothing"

    @staticmethod
    def learn(method):
        """A step by a loss of one's own."""
        inputs, labels = batches(1)[0]
        nn.functional.cross_entropy(method.model(inputs), labels).backward()
        torch.optim.SGD(method.model.parameters(), lr=0.1).step()
        method.model.zero_grad()

    @pytest.mark.parametrize("name", ["lwf", "replay", "dgr", "icarl", "si+replay"])
    @pytest.mark.filterwarnings("ignore:clext. si saw no step")
    @pytest.mark.filterwarnings("ignore:clext. loss.. of this dgr .* its generator")
    def test_is_noticed_from_the_second_task_on(self, name):
        method = make_method(name, model())
        method.consolidate(batches(0))  # nothing was learned before
        for _ in range(2):
            self.learn(method)
            with pytest.warns(UserWarning, match=self.MESSAGE):
                method.consolidate(batches(1))
        self.learn(method)
        method.loss(*batches(2)[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", self.MESSAGE)
            method.consolidate(batches(2))

    @pytest.mark.parametrize("name", ["ewc", "agem", "joint", "ewc+joint"])
    def test_is_as_good_where_it_is_not_the_loss_that_remembers(self, name):
        method = make_method(name, model())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for task in range(2):
                method.consolidate(batches(task))

    @pytest.mark.parametrize("name", ["lwf", "si+replay"])
    @pytest.mark.filterwarnings("ignore:clext. si saw no step")
    def test_nothing_is_known_of_the_task_that_was_stopped_in(self, name):
        method, resumed = make_method(name, model()), make_method(name, model())
        method.consolidate(batches(0))
        resumed.load_state_dict(method.state_dict())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", self.MESSAGE)
            resumed.consolidate(batches(1))

    def test_nothing_is_changed_where_warnings_are_errors(self):
        method = make_method("ewc+replay", model())
        method.consolidate(batches(0))
        self.learn(method)
        before = method.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=self.MESSAGE):
                method.consolidate(batches(1))
        assert_same_state(method.state_dict(), before)

    @pytest.mark.parametrize("name", ["lwf", "replay", "dgr", "icarl", "ewc+lwf"])
    def test_runs_raise_no_alarm(self, name):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", self.MESSAGE)
            clext.train(name, model=small(), **{**QUICK, "epochs": 1, "tasks": 3})


class TestRuns:
    def test_the_pair_remembers_more_than_the_penalty_alone(self):
        options = {**QUICK, "scenario": "split", "tasks": 5, "incremental": "class", "lr": 3e-3}
        alone = clext.train("ewc", model=small(), **options)
        pair = clext.train(["ewc", "replay"], model=small(), budget=200, **options)
        assert pair.average_accuracy[-1] > alone.average_accuracy[-1] + 0.2
        assert pair.label == "ewc+replay"
        assert pair.config["method_options"]["replay"]["budget"] == 200
        assert pair.config["method_options"]["ewc"]["gamma"] == 1.0

    def test_the_seed_decides(self):
        models = [small(), small()]
        runs = [clext.train("si+replay", model=given, seed=4, **QUICK) for given in models]
        assert runs[0].curve == runs[1].curve
        assert same(*map(weights, models))

    def test_the_strengths_of_both_are_recorded_and_shown(self):
        result = clext.train("ewc+replay", model=small(), **{**QUICK, "replay.strength": 3})
        assert result.config["strength"] == 250
        assert result.config["method_options"]["ewc"]["strength"] == 250
        assert result.config["method_options"]["replay"]["strength"] == 3
        assert "250, 3" in str(clext.Comparison({"ewc+replay": result}))

    def test_a_comparison_has_both(self):
        found = clext.compare(["ewc", "ewc+replay"], model=small(), **QUICK)
        assert list(found.results) == ["ewc", "ewc+replay"]
        assert "ewc+replay" in found.table()

    @pytest.mark.parametrize("name", REHEARSALS)
    def test_each_rehearsal_trains_with_rwalk(self, name):
        given = small()
        before = weights(given)
        result = clext.train(f"rwalk+{name}", model=given, **QUICK)
        assert result.complete
        assert not same(before, weights(given))
