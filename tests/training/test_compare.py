"""`clext.compare`: the same start and the same tasks for every method."""

import copy

import pytest
import torch
from quick_runs import QUICK, same, small, weights
from torch import nn

import clext
from clext.methods.parts.vae import VAE


class TestCompare:
    def test_all_start_from_the_same_weights_and_see_the_same_tasks(self):
        model = small()
        before = weights(model)
        comparison = clext.compare(["baseline", "ewc"], model=model, **QUICK)
        assert same(before, weights(model))
        assert list(comparison.results) == ["baseline", "ewc"]
        alone = clext.train("baseline", model=copy.deepcopy(model), **QUICK)
        assert comparison["baseline"].curve == alone.curve
        assert comparison["ewc"].curve[:2] == alone.curve[:2]  # no penalty in the first task

    def test_runs_on_other_tasks_than_joint_have_no_intransigence(self):
        options = {**QUICK, "epochs": 1}
        results = {
            "joint": clext.train("joint", model=small(), **options),
            "other": clext.train("baseline", model=small(), scenario="rotated", **options),
        }
        lines = clext.Comparison(results).table().splitlines()
        column = lines[0].split().index("intr.")
        shown = {line.split()[0]: line.split()[column] for line in lines[1:3]}
        assert shown == {"joint": "+0.0000", "other": "-"}

    def test_options_reach_their_method(self):
        comparison = clext.compare(
            ["ewc", ["si", "replay"]],
            model=small(),
            options={"ewc": {"strength": 3.0, "gamma": 0.5}, "si+replay": {"xi": 0.3, "budget": 7}},
            **QUICK,
        )
        assert list(comparison.results) == ["ewc", "si+replay"]
        ewc, pair = (result.config for result in comparison.results.values())
        assert (ewc["strength"], ewc["method_options"]["gamma"]) == (3.0, 0.5)
        assert pair["method_options"]["si"]["xi"] == 0.3
        assert pair["method_options"]["replay"]["budget"] == 7

    def test_a_generator_given_for_two_entries_is_trained_by_each_from_the_start(self):
        generator = VAE((64,), (8,), 4)
        before = weights(generator)
        given = {name: {"generator": generator} for name in ("dgr", "ewc+dgr")}
        comparison = clext.compare([*given], model=small(), options=given, **QUICK)
        assert same(before, weights(generator))
        own = {"ewc+dgr": {"generator": generator}}
        alone = clext.compare([*own], model=small(), options=own, **QUICK)
        assert comparison["ewc+dgr"].curve == alone["ewc+dgr"].curve

    def test_a_method_that_diverges_does_not_stop_the_others(self, tmp_path):
        with pytest.warns(UserWarning, match=r"si: the loss became nan at task 1"):
            comparison = clext.compare(
                ["si", "baseline"],
                model=small(),
                lr=1e-2,
                options={"si": {"strength": 1e300}},
                out=tmp_path,
                **QUICK,
            )
        assert not comparison["si"].complete
        assert comparison["baseline"].complete
        loaded = clext.Comparison.load(tmp_path)
        assert "stopped early: si" in str(loaded)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy.png", "comparison.json"]

    def test_a_method_that_cannot_learn_a_task_does_not_stop_the_others(self, tmp_path):
        x, y = torch.rand(20, 4), torch.arange(20) % 3
        tasks = [((x, y), (x, y)), ((x - 1, y), (x - 1, y))]
        with pytest.warns(UserWarning, match=r"^dgr: inputs are .* between"):
            comparison = clext.compare(
                ["baseline", "dgr", "ewc"],
                scenario=clext.Scenario.from_datasets(tasks),
                epochs=1,
                progress=False,
                out=tmp_path,
            )
        assert [r.complete for r in comparison.results.values()] == [True, False, True]
        assert "stopped early: dgr: inputs are" in str(clext.Comparison.load(tmp_path))

    def test_with_seeds_it_is_the_sweep_over_them(self, tmp_path):
        options = {"model": small(), "epochs": 1, "threads": 1}
        given = {**QUICK, **options, "options": {"ewc": {"strength": 3.0}}}
        swept = clext.sweep("baseline, ewc", seeds=(1, 2), out=tmp_path / "swept", **given)
        compared = clext.compare("baseline, ewc", seeds=range(1, 3), out=tmp_path / "both", **given)
        assert compared.table("csv") == swept.table("csv")
        assert compared["ewc", None, 2].strengths == [3.0]
        assert clext.Sweep.load(tmp_path / "both").table() == compared.table()
        nowhere = clext.compare("baseline", seeds=[1], **{**QUICK, **options})
        assert nowhere["baseline", None, 1].curve == swept["baseline", None, 1].curve
        with pytest.raises(ValueError, match="expected seeds, got seed"):
            clext.compare("ewc", seeds=[1], seed=1, **QUICK)

    def test_a_model_that_does_not_fit_stops_all(self, tmp_path):
        with pytest.raises(ValueError, match="model must turn inputs"):
            clext.compare(["si", "ewc"], model=nn.Linear(3, 10), out=tmp_path, **QUICK)
        assert list(tmp_path.iterdir()) == []

    def test_methods_and_their_options_may_be_written_in_capitals(self):
        options = {"EWC": {"strength": 3.0}}
        comparison = clext.compare("EWC, SI", model=small(), options=options, **QUICK)
        assert list(comparison.results) == ["ewc", "si"]
        assert comparison["ewc"].strengths == [3.0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"methods": ["ewc", "sii"]}, "unknown method 'sii'.*'si'"),
            ({"methods": []}, "at least one method"),
            ({"methods": ["si", "si"]}, "'si' is given twice"),
            ({"methods": ["si"], "options": {"ewc": {}}}, "unknown method in options 'ewc'"),
            ({"methods": ["si"], "options": {"si": {"xii": 1}}}, "'xii'.*'xi'"),
            ({"methods": ["si"], "tasks": 0}, "tasks must be"),
            ({"methods": 3}, r"methods must be a list of names, such as \['ewc', 'si'\], got 3;"),
            ({"methods": clext.EWC}, "methods must be a list of names, .* got <class '.*EWC'>;"),
            ({"methods": [clext.SI(small())]}, "methods must be a list of names, .* got SI"),
            ({"epoch": 1}, "unknown option of compare 'epoch'; did you mean 'epochs'"),
            ({"methods": "ewc, sii"}, "unknown method 'sii'.*'si'"),
            ({"methods": [["ewc", "si"]]}, "Combined: expected a method .* got ewc and si"),
            ({"methods": [["ewc", "lwf"], "ewc+lwf"]}, "'ewc.lwf' is given twice"),
            ({"methods": "si", "options": {"si": 3}}, r"options of 'si' must be a dict, .* got 3$"),
            ({"methods": "si", "out": 5}, "^compare: out must be a path, .* got 5$"),
        ],
    )
    def test_bad_input_before_any_work(self, arguments, message, monkeypatch):
        monkeypatch.setattr(
            "clext.training.compare.load_scenario", lambda *_args, **_kwargs: pytest.fail("work")
        )
        with pytest.raises(ValueError, match=message):
            clext.compare(**{**QUICK, **arguments})
