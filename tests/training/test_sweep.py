"""`clext.sweep`: each run as `train` gives it, once, and what the runs say together."""

import copy
import csv
import io
import itertools
import json

import numpy as np
import pytest
import torch
from quick_runs import QUICK, same, small, weights

import clext

OPTIONS = {**QUICK, "epochs": 1, "lr": 1e-2}
PLAN = {"methods": "baseline, ewc", "strengths": [1, 1000], "seeds": [3, 4]}
RUNS = [
    *[("baseline", None, 3), ("baseline", None, 4)],
    *[("ewc", strength, seed) for strength in (1, 1000) for seed in (3, 4)],
]


def sweep(folder, **changes):
    arguments = {**PLAN, "model": small(), "out": folder, "threads": 1, **OPTIONS, **changes}
    return clext.sweep(**arguments)


def numbers(result):
    """What a run is, but for its times."""
    entries = result.to_json()
    del entries["timings"], entries["summary"]["seconds"]
    return str(entries)  # NaN is equal to NaN there


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A sweep that nothing has interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    return sweep(folder), folder


@pytest.fixture
def trained(monkeypatch):
    """The method, strength and seed of each run that is made from here on, in this process."""
    made, run = [], clext.training.sweep.train_method

    def recording(method, scenario, settings, *arguments, **options):
        strength = method.strength if method.has_strength else None
        made.append((method.name, strength, settings.seed))
        return run(method, scenario, settings, *arguments, **options)

    monkeypatch.setattr("clext.training.sweep.train_method", recording)
    return made


class TestRuns:
    def test_a_run_is_what_train_gives(self, done):
        results = done[0].results
        assert list(results) == done[0].runs == RUNS
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for seed in (3, 4):
            alone = clext.train("ewc", strength=1000, seed=seed, model=small(), **OPTIONS)
            assert numbers(results["ewc", 1000, seed]) == numbers(alone)
        torch.set_num_threads(threads)

    def test_each_has_a_folder_with_its_result(self, done):
        written = {str(path.relative_to(done[1])) for path in done[1].rglob("*.*")}
        folders = [f"{cell}/seed-{s}" for cell in ("baseline", "ewc-1", "ewc-1000") for s in (3, 4)]
        assert written == {"sweep.json", "accuracy.png", *(f"{f}/result.json" for f in folders)}
        loaded = clext.Sweep.load(done[1])
        assert list(loaded.results) == RUNS
        assert loaded.table("csv") == done[0].table("csv")

    def test_processes_give_the_same_bits(self, done, tmp_path):
        model = small()
        before = weights(model)
        there = sweep(tmp_path, n_jobs=2, model=model)
        assert same(before, weights(model))
        assert list(map(numbers, there.results.values())) == [
            *map(numbers, done[0].results.values())
        ]

    def test_threads_are_shared_out_recorded_and_given_back(self, tmp_path):
        before = torch.get_num_threads()
        plan = {"methods": "baseline", "strengths": None, "seeds": [0]}
        there = sweep(tmp_path, threads=before + 1, **plan)
        assert there.results["baseline", None, 0].config["threads"] == before + 1
        assert torch.get_num_threads() == before

    def test_strengths_of_each_method_options_and_combinations(self, tmp_path):
        there = sweep(
            tmp_path,
            methods=["ewc+replay", "si", "baseline"],
            strengths={"ewc+replay": [3]},
            options={"si": {"strength": 7, "xi": 0.3}, "ewc+replay": {"budget": 20}},
            seeds=[0],
        )
        runs = [("ewc+replay", 3, 0), ("si", None, 0), ("baseline", None, 0)]
        assert list(there.results) == runs
        pair, si, _ = (result.config for result in there.results.values())
        assert (pair["strength"], pair["method_options"]["replay"]["budget"]) == (3, 20)
        assert (si["strength"], si["method_options"]["xi"]) == (7, 0.3)
        assert {path.name for path in tmp_path.glob("*/")} == {"ewc+replay-3", "si", "baseline"}

    def test_all_learn_the_data_that_was_found_first_and_said_once(
        self, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr("clext.data.datasets.download", lambda *_args, **_kwargs: "no network")
        empty = {"dataset": "auto", "data_dir": tmp_path, "progress": True}
        there = sweep(tmp_path / "out", **empty)
        assert {result.config["dataset"] for result in there.results.values()} == {"digits"}
        said = capsys.readouterr().err
        assert said.count("clext: data set digits") == 1
        assert "sweep: 6 of 6 runs, ewc-1000/seed-4: accuracy 0." in said


class TestContinuation:
    @pytest.fixture
    def folder(self, done, tmp_path):
        """A copy of the sweep's folder."""
        done[0].save(tmp_path)
        return tmp_path

    def test_only_what_is_missing_is_run(self, done, folder, trained):
        (folder / "ewc-1" / "seed-3" / "result.json").unlink()
        damaged = folder / "baseline" / "seed-4" / "result.json"
        damaged.write_text(damaged.read_text()[:300])
        incomplete = copy.deepcopy(done[0].results["ewc", 1000, 4])
        incomplete.accuracy[1] = np.nan
        incomplete.save(folder / "ewc-1000" / "seed-4", picture=False)
        again = sweep(folder)
        assert trained == [("baseline", None, 4), ("ewc", 1, 3), ("ewc", 1000, 4)]
        assert again.table("csv") == done[0].table("csv")
        assert list(again.results) == RUNS

    def test_more_seeds_and_strengths_run_what_is_new(self, folder, trained):
        more = sweep(folder, strengths=[10, 1000], seeds=[4, 5])
        assert trained == [
            ("baseline", None, 5),
            *[("ewc", 10, 4), ("ewc", 10, 5)],
            ("ewc", 1000, 5),
        ]
        assert len(more.results) == 6
        assert clext.Sweep.load(folder).table("csv") == more.table("csv")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lr": 0.02}, r"baseline/seed-3 holds a run with lr 0.01, not 0.02;"),
            ({"epochs": 2}, "with epochs 1, not 2; choose another folder"),
            ({"options": {"ewc": {"gamma": 0.5}}}, r"ewc-1/seed-3 .* method_options .*gamma': 0.5"),
            ({"model": torch.nn.Linear(64, 10)}, "with model 'MLP 64-32-10', not 'Linear'"),
        ],
    )
    def test_other_settings_are_refused(self, folder, changes, message, trained):
        before = (folder / "sweep.json").read_bytes()
        with pytest.raises(ValueError, match=message):
            sweep(folder, **changes)
        assert trained == []
        assert (folder / "sweep.json").read_bytes() == before

    def test_a_sweep_that_is_not_finished_can_be_looked_at(self, folder):
        (folder / "ewc-1" / "seed-3" / "result.json").unlink()
        part = clext.Sweep.load(folder)
        assert part.failed == {("ewc", 1, 3): "not finished"}
        row = next(line for line in part.table().splitlines() if line.startswith("ewc"))
        assert row.split()[:5] == ["ewc", "1", "1", "of", "2"]


class TestFailures:
    @pytest.mark.parametrize("n_jobs", [1, 2])
    def test_a_failed_run_stops_no_other_and_is_tried_again(self, tmp_path, n_jobs, trained):
        strengths = [1e300, 1]
        with pytest.warns(UserWarning, match="failed") as caught:
            there = sweep(tmp_path, strengths=strengths, n_jobs=n_jobs)
        said = sorted(str(warning.message).partition(" the loss")[0] for warning in caught)
        assert said == [f"sweep: ewc-1e+300/seed-{seed} failed: ewc:" for seed in (3, 4)]
        assert list(there.failed) == [("ewc", 1e300, 3), ("ewc", 1e300, 4)]
        assert len(there.results) == 4
        assert "0 of 2" in there.table()
        assert "ewc-1e+300/seed-4: ewc: the loss became" in there.table()
        assert clext.Sweep.load(tmp_path).table() == there.table()
        trained.clear()
        with pytest.warns(UserWarning, match="failed"):
            sweep(tmp_path, strengths=strengths)
        assert trained == [("ewc", 1e300, 3), ("ewc", 1e300, 4)]

    def test_where_all_fail_there_is_a_table_and_no_picture(self, tmp_path, monkeypatch):
        def broken(*_args, **_kwargs):
            raise RuntimeError("no\nidea")

        monkeypatch.setattr("clext.training.sweep.train_method", broken)
        with pytest.warns(UserWarning, match="failed: no$"):
            there = sweep(tmp_path)
        assert set(there.failed.values()) == {"no"}
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
        assert clext.Sweep.load(tmp_path).failed == there.failed
        with pytest.raises(ValueError, match="no run has finished"):
            there.plot()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": "ewc, sii"}, "unknown method 'sii'"),
            ({"methods": []}, "sweep: expected at least one method"),
            ({"strengths": {"si": [1]}}, "unknown method in strengths 'si'"),
            ({"strengths": {"baseline": [1]}}, "strength"),
            ({"strengths": 3}, "sweep: expected strengths as a list of numbers, got 3"),
            ({"strengths": []}, r"sweep: expected strengths as a list of numbers, got \[\]"),
            ({"strengths": {"ewc": "10"}}, "strengths of 'ewc' as a list of numbers, got '10'"),
            ({"strengths": ["x"]}, "sweep: strengths must be a finite number, got 'x'"),
            ({"strengths": [-1]}, "strength must be a finite number >= 0"),
            ({"options": {"ewc": {"strength": 1}}}, "'ewc' is given in options and in strengths"),
            ({"options": {"ewc": {"gama": 1}}}, "'gama'; did you mean 'gamma'"),
            ({"seeds": 5}, "sweep: expected seeds as a list of numbers, got 5"),
            ({"seeds": [0.5]}, "sweep: seeds must be an integer >= 0, got 0.5"),
            ({"seeds": itertools.count()}, "expected at most 10,000 seeds, got more"),
            ({"seeds": range(4000)}, "of 3 methods and strengths and 4,000 seeds; choose"),
            ({"seed": 5}, "sweep: expected seeds, got seed"),
            ({"n_job": 2}, "unknown option of sweep 'n_job'; did you mean 'n_jobs'"),
            ({"n_jobs": 0}, "sweep: n_jobs must be how many runs at once, or -1 for all cores"),
            ({"threads": 0}, "sweep: threads must be an integer >= 1"),
            ({"out": 5}, "sweep: out must be a path"),
            ({"tasks": 0}, "tasks must be"),
        ],
    )
    def test_bad_input_before_any_work(self, tmp_path, changes, message, monkeypatch):
        monkeypatch.setattr(
            "clext.training.sweep.load_scenario", lambda *_args, **_kwargs: pytest.fail("work")
        )
        with pytest.raises(ValueError, match=message):
            sweep(**{"folder": tmp_path / "out", **changes})
        assert list(tmp_path.iterdir()) == []


class TestWhatTheySayTogether:
    def test_the_table_has_mean_deviation_and_interval(self, done):
        accuracy = [done[0].results["ewc", 1, seed].average_accuracy[-1] for seed in (3, 4)]
        mean, std = np.mean(accuracy), np.std(accuracy, ddof=1)
        half = 12.706204736 * std / np.sqrt(2)  # Student's with one degree of freedom
        expected = f"{mean:.4f} ± {std:.4f} [{mean - half:.4f}, {mean + half:.4f}]"
        lines = done[0].table().splitlines()
        assert lines[0].split() == ["method", "strength", "seeds", "accuracy"]
        assert lines[5].split() == ["method", "strength", "forgetting", "time"]
        assert lines[2].startswith("ewc")
        assert expected in lines[2]
        assert done[0].table("markdown").splitlines()[3].startswith(f"| ewc | 1 | 2 | {expected} |")
        latex = expected.replace("±", r"$\pm$")
        assert f"ewc & 1 & 2 & {latex} & " in done[0].table("latex")
        assert done[0].table("latex").count(r"\\") == 4

    def test_csv_has_every_metric_in_full(self, done):
        rows = list(csv.DictReader(io.StringIO(done[0].table("csv"))))
        assert [(row["method"], row["strength"]) for row in rows] == [
            *[("baseline", ""), ("ewc", "1.0"), ("ewc", "1000.0")],
        ]
        for metric in ("accuracy", "forgetting", "worst_accuracy"):
            summary = done[0].summary(metric, "ewc", 1000)
            assert float(rows[2][f"{metric}_mean"]) == summary.mean
            assert float(rows[2][f"{metric}_high"]) == summary.high

    def test_one_seed_has_a_mean_alone(self, tmp_path, done):
        there = sweep(tmp_path, methods="baseline", strengths=None, seeds=[3])
        value = done[0].results["baseline", None, 3].average_accuracy[-1]
        assert f"| {value:.4f} |" in there.table("markdown")
        assert there.table("csv").splitlines()[1].split(",")[5:8] == ["", "", ""]
        assert there.plot().axes[0].collections[:] == []

    def test_the_best_strength_has_the_highest_mean(self, done):
        means = {s: done[0].summary("accuracy", "ewc", s).mean for s in (1, 1000)}
        assert done[0].best("ewc") == max(means, key=means.get)
        assert done[0].best("baseline") is None
        with pytest.raises(ValueError, match="unknown method of the sweep 'si'"):
            done[0].best("si")
        assert done[0]["ewc", 1, 3] is done[0].results["ewc", 1, 3]
        assert [run for run, _ in done[0].items()] == RUNS
        with pytest.raises(ValueError, match=r"unknown result \('ewc', 2, 3\)"):
            done[0]["ewc", 2, 3]
        with pytest.raises(ValueError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
            done[0].summary("acuracy", "ewc", 1)

    def test_the_picture_shades_the_interval_of_each_method_at_its_best(self, done, tmp_path):
        axes = done[0].plot(tmp_path / "picture.svg").axes[0]
        assert (tmp_path / "picture.svg").exists()
        labels = [text.get_text().rpartition(" ")[0] for text in axes.texts]
        assert [label for label in labels if "task" not in label] == [
            *["baseline", f"ewc ({done[0].best('ewc'):g})"],
        ]
        curves = [done[0].results["baseline", None, seed].curve for seed in (3, 4)]
        line, band = axes.lines[0], axes.collections[0].get_paths()[0].vertices
        assert line.get_ydata() == pytest.approx(np.mean(curves, axis=0))
        half = 12.706204736 * np.std(curves, axis=0, ddof=1) / np.sqrt(2)
        edges = np.concatenate([np.mean(curves, axis=0) - half, np.mean(curves, axis=0) + half])
        edges = edges.clip(0, 1)
        assert np.isin(np.round(edges, 6), np.round(band[:, 1], 6)).all()

    def test_of_one_method_the_picture_has_all_strengths(self, done):
        runs = {run: result for run, result in done[0].results.items() if run[0] == "ewc"}
        axes = clext.Sweep([*runs], runs, {}).plot().axes[0]
        shown = [text.get_text() for text in axes.texts if text.get_text().startswith("ewc")]
        assert [text.split()[1] for text in shown] == ["(1)", "(1000)"]
        assert len({line.get_color() for line in axes.lines[:2]}) == 2

    def test_what_is_no_sweep_is_refused(self, done):
        with pytest.raises(
            ValueError, match="expected a sweep saved by clext, found kind 'result'"
        ):
            clext.Sweep.load(done[1] / "ewc-1" / "seed-3" / "result.json")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"runs": ...}, "not a complete sweep: 'runs' is missing"),
            ({"failed": ...}, "not a complete sweep: 'failed' is missing"),
            ({"runs": 3}, "not a valid sweep: runs is 3, expected list"),
            ({"runs": [3]}, r"runs\[0\] is 3, expected list"),
            ({"runs": [["ewc", 1]]}, "not a valid sweep: zip"),
            ({"runs": [["ewc", 1, "3"]]}, r"runs\[0\].seed is '3', expected int"),
            ({"runs": [["ewc", 10**400, 3]]}, "not a valid sweep: int too large"),
            ({"runs": [["../ewc", 1, 3]]}, r"runs\[0\].method is '../ewc', expected a name"),
            ({"failed": {"ewc": 3}}, "failed.ewc is 3, expected str"),
        ],
    )
    def test_damaged_sweeps_are_refused(self, done, tmp_path, changes, message):
        content = json.loads((done[1] / "sweep.json").read_text()) | changes
        content = {name: value for name, value in content.items() if value is not ...}
        (tmp_path / "sweep.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as caught:
            clext.Sweep.load(tmp_path)
        assert "sweep.json: not a " in str(caught.value)

    def test_runs_that_differ_in_size_are_refused(self, done, tmp_path):
        done[0].save(tmp_path)
        other = copy.deepcopy(done[0].results["ewc", 1, 3])
        other.config["epochs"], other.task_curve = 2, []
        other.save(tmp_path / "ewc-1" / "seed-3", picture=False)
        with pytest.raises(ValueError, match="its runs differ in tasks or epochs"):
            clext.Sweep.load(tmp_path)
