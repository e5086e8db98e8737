"""Results: what is kept, how it reads, and files."""

import io
import json
import math
import re

import numpy as np
import pytest
from made_results import result

from clext import Comparison, Result

NAN = math.nan


CONFIG = {"method": "ewc", "tasks": 3, "epochs": 2}


class TestNumbers:
    def test_summary_numbers_come_from_the_accuracy_matrix(self):
        ours = result()
        assert ours.average_accuracy == pytest.approx([0.87, 0.82, 0.77])
        assert ours.forgetting == pytest.approx(0.15)
        assert ours.backward_transfer == pytest.approx(-0.15)
        assert ours.forward_transfer == pytest.approx(0.05)
        assert ours.learning_accuracy == pytest.approx(0.87)
        assert ours.worst_accuracy == pytest.approx((0.67 + 0.77) / 2)
        ours.steps = [{"task": 2, "step": 1, "accuracy": [0.5, 0.9, 0.1]}]
        assert ours.worst_accuracy == pytest.approx((0.5 + 0.77) / 2)
        assert ours.seconds == 2.5
        assert ours.complete

    def test_an_unfinished_run_says_so(self):
        ours = result(done=1)
        ours.stopped = "the power went out"
        assert not ours.complete
        assert ours.average_accuracy == pytest.approx([0.87])
        assert "after 1 of 3 tasks" in str(ours)
        assert "stopped early: the power went out" in str(ours)

    def test_intransigence_is_measured_against_a_joint_run(self):
        joint = result("joint")  # by its longer name 0.02 worse on every task
        joint.config["seed"] = 7  # one joint run can serve runs of several seeds
        assert result().intransigence(joint) == pytest.approx([-0.02] * 3)
        with pytest.raises(ValueError, match="expected a joint run with tasks 3, got tasks 2"):
            result().intransigence(result("joint", tasks=2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "ewc"}, "expected a run of \"joint\", got one of 'ewc'$"),
            ({"scenario": "split"}, "with scenario 'permuted', got scenario 'split'; both must"),
            ({"data": {"name": "digits", "train": 9}}, "with training examples None, got .* 9"),
        ],
    )
    def test_intransigence_against_a_run_of_something_else_is_refused(self, change, message):
        joint = result("joint")
        joint.config.update(change)
        with pytest.raises(ValueError, match=message):
            result().intransigence(joint)

    def test_nothing_done_can_still_be_read(self):
        assert "no task finished" in str(result(done=0))


class TestText:
    def test_the_table_shows_each_accuracy_where_it_was_taken(self):
        assert str(result()).splitlines() == [
            "ewc on permuted digits: average accuracy 0.7700 after 3 tasks, 2 epochs each",
            "",
            "accuracy on   task 1  task 2  task 3  average",
            "after task 1  0.8700                   0.8700",
            "after task 2  0.7700  0.8700           0.8200",
            "after task 3  0.6700  0.7700  0.8700   0.7700",
            "",
            "forgetting 0.1500, backward transfer -0.1500, forward transfer +0.0500",
            "learning accuracy 0.8700, minimum accuracy 0.7200 (lowest since learned)",
            "2.5 s (training 2.0, evaluation 0.5)",
        ]
        assert repr(result()) == str(result())

    @pytest.mark.parametrize("tasks", [2, 6, 7, 10, 11, 30])
    def test_many_tasks_still_fit_a_terminal(self, tasks):
        text = str(result(tasks=tasks))
        assert max(map(len, text.splitlines())) <= 80
        assert f"after task {tasks}" in text
        assert bool(re.search(rf"(?<!after )task {tasks}\b", text)) == (tasks <= 10)

    def test_columns_that_do_not_fit_stand_below(self):
        runs = {"ewc+replay": result("ewc"), "baseline": result("baseline")}
        runs["joint"] = result("joint")
        runs["joint"].stopped = "the power went out, " * 9
        lines = str(Comparison(runs)).splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[0].split()[-1] == "min-ACC"
        assert lines[5].split() == ["method", "strength", "intr.", "time"]
        assert [line.split()[0] for line in lines[6:9]] == [line.split()[0] for line in lines[1:4]]
        assert lines[10].startswith("joint stopped early: the power went out")
        assert any(re.match("joint +the upper bound: ", line) for line in lines)

    def test_a_comparison_lists_the_best_first_and_the_unfinished_last(self):
        runs = {"ewc": result("ewc"), "si": result("si"), "rwalk": result("rwalk", done=1)}
        lines = str(Comparison(runs)).splitlines()
        titles = "method strength accuracy forget BWT FWT LA min-ACC"
        assert lines[0].split() == titles.split()
        assert [line.split()[0] for line in lines[1:4]] == ["si", "ewc", "rwalk"]
        ewc = "ewc 2.5 0.7700 0.1500 -0.1500 +0.0500 0.8700 0.7200"
        rwalk = "rwalk 2.5 0.8500 (1 of 3) - - +0.0500 0.8500 -"
        assert [line.split() for line in lines[2:4]] == [ewc.split(), rwalk.split()]
        assert len({line.index("0.") for line in lines[1:4]}) == 1  # below their titles
        assert len({len(line) for line in lines[:4]}) == 1
        assert [line.split()[2:] for line in lines[5:9]] == [["time"], *[["2.5", "s"]] * 3]
        legend = [line.split()[0] for line in lines[10:] if not line.startswith(" ")]
        assert legend == ["accuracy", "forget", "BWT", "FWT", "LA", "min-ACC"]
        assert "(1 of 3)" in lines[10]
        assert "of 3" not in str(Comparison({"ewc": result()}))
        assert "- (0 of 3)" in str(Comparison({"si": result("si", done=0)}))

    def test_classes_that_cannot_be_answered_have_no_forward_transfer(self):
        ours = result()
        ours.config["incremental"] = "class"
        assert math.isnan(ours.forward_transfer)
        assert "forward transfer" not in str(ours)
        lines = str(Comparison({"ewc": ours})).splitlines()
        assert lines[1].split()[5] == "-"
        assert any(line.endswith("none with class-incremental tasks") for line in lines)

    def test_a_combination_shows_the_strength_of_both_parts(self):
        pair = result("ewc+replay")
        pair.config["method_options"] = {"ewc": {"strength": 250.0}, "replay": {"strength": 1.0}}
        assert pair.strengths == [250.0, 1.0]
        assert "250, 1  " in str(Comparison({"ewc+replay": pair})).splitlines()[1]
        del pair.config["method_options"]  # as older versions wrote it
        assert pair.strengths == [2.5]
        pair.config["strength"] = None
        assert str(Comparison({"gem": pair})).splitlines()[1].split()[:2] == ["gem", "-"]

    def test_a_comparison_with_a_joint_run_has_intransigence(self):
        lines = str(Comparison({"ewc": result("ewc"), "joint": result("joint")})).splitlines()
        assert lines[0].split()[8] == "intr."
        rows = {line.split()[0]: line.split() for line in lines[1:3]}
        assert rows["ewc"][8] == "-0.0200"
        assert rows["joint"][8] == "+0.0000"
        assert lines[-2].startswith("intr.     intransigence: what joint does better")
        assert lines[-1].startswith("joint     the upper bound: ")

    @pytest.mark.parametrize("incremental", ["task", "class"])
    def test_what_is_told_apart_is_in_the_titles(self, incremental):
        ours = result()
        ours.config["incremental"] = incremental
        expected = f"ewc on permuted digits, {incremental}-incremental: average"
        assert str(ours).startswith(expected)
        title = f"Permuted digits, {incremental}-incremental"
        assert ours.plot().axes[0].get_title(loc="left") == f"ewc: {title}"
        pair = Comparison({"ewc": ours, "si": result("si")})
        assert pair.plot().axes[0].get_title(loc="left") == title
        assert ours.plot_matrix().axes[0].get_title(loc="left") == f"ewc\n{title}"
        ours.config["incremental"] = "domain"
        assert "incremental" not in str(ours)


class TestFiles:
    @pytest.mark.parametrize("done", [0, 1, 3])
    def test_what_is_saved_is_loaded(self, tmp_path, done):
        ours = result(done=done)
        ours.stopped = "why" if done < 3 else None
        ours.task_curve, ours.chance = [[0.5], [0.6], [0.7, 0.1]][: 3 * done], [0.1] * 3
        ours.save(tmp_path / "new" / "folder")
        for path in (tmp_path / "new/folder", tmp_path / "new/folder/result.json"):
            theirs = Result.load(path)
            np.testing.assert_array_equal(theirs.accuracy, ours.accuracy)
            assert theirs.accuracy.dtype == np.float64
            assert (theirs.curve, theirs.config) == (ours.curve, ours.config)
            assert (theirs.task_curve, theirs.chance) == (ours.task_curve, ours.chance)
            assert (theirs.timings, theirs.stopped) == (ours.timings, ours.stopped)

    def test_the_file_is_strict_json_with_a_row_on_a_line(self, tmp_path):
        result().save(tmp_path)
        text = (tmp_path / "result.json").read_text()
        assert "NaN" not in text
        assert '"accuracy": [\n    [0.87, null, null],' in text

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        content = json.loads(text, parse_constant=refuse)
        assert (content["format"], content["kind"]) == (1, "result")
        assert content["summary"]["forgetting"] == pytest.approx(0.15)

    def test_odd_settings_become_text(self, tmp_path):
        ours = result()
        ours.config["method_options"] = {"kernel": object, "rate": math.inf, "pair": (1, "[a,\n")}
        ours.save(tmp_path, picture=False)
        options = Result.load(tmp_path).config["method_options"]
        assert options["rate"] is None
        assert options["pair"] == [1, "[a,\n"]
        assert "object" in options["kernel"]

    def test_comparisons_too(self, tmp_path):
        ours = Comparison({"mine": result(), "theirs": result("si", done=1)})
        ours.save(tmp_path)
        theirs = Comparison.load(tmp_path)
        assert str(theirs) == str(ours)
        np.testing.assert_array_equal(theirs["mine"].accuracy, ours["mine"].accuracy)
        assert (tmp_path / "accuracy.png").stat().st_size > 10_000

    def test_an_interrupted_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        result().save(tmp_path, picture=False)
        before = (tmp_path / "result.json").read_text()
        broken = result("si")
        monkeypatch.setattr("pathlib.Path.replace", lambda *_args: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011
            broken.save(tmp_path, picture=False)
        assert (tmp_path / "result.json").read_text() == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not a JSON file"),
            ("[" * 100_000, "not a JSON file"),
            ("[]", "expected a result saved by clext, found kind None"),
            ('{"kind": "comparison", "format": 1}', "found kind 'comparison'"),
            ('{"kind": "result", "format": 99}', "expected format 1, found 99"),
            ('{"kind": "result", "format": 1}', "not a complete result: 'config' is missing"),
        ],
    )
    def test_foreign_files_are_refused_by_name(self, tmp_path, content, message):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            Result.load(tmp_path)
        assert "result.json" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("accuracy", [[1.0], [1.0, 2.0]], "not a valid result"),
            ("accuracy", [[1.0]], "accuracy has 1 rows, for 3 tasks of 2 epochs"),
            ("untrained", 0.1, "untrained is 0.1, expected list"),
            ("config", {"tasks": 3}, "'method' is missing"),
            ("config", {**CONFIG, "tasks": 10_000_000_000}, "3 rows, for 10000000000 tasks"),
            ("config", {**CONFIG, "epochs": 0}, "of 0 epochs"),
            ("config", {**CONFIG, "data": None}, "config.data is None, expected dict"),
            ("config", {**CONFIG, "method": r"$\frac{"}, "expected a name"),
            (
                "config",
                {**CONFIG, "method": "ewc+replay", "method_options": {"ewc": 5}},
                "method_options.ewc is 5, expected dict",
            ),
            ("timings", {"training": "2"}, "timings.training is '2', expected int | float"),
            ("steps", [{"task": "1"}], r"steps\[0\].task is '1', expected int"),
            ("accuracy", [[10**400] * 3] * 3, "not a valid result"),
            ("curve", "abc", "curve is 'abc', expected list"),
            ("curve", [None], r"curve\[0\] is None, expected int | float"),
            ("curve", [0.5, 1e999], "an accuracy is inf, expected a fraction"),
            ("chance", [2], "an accuracy is 2, expected a fraction"),
            ("task_curve", [[0.5], [0.5, 0.6]], r"task_curve\[1\] has 2 entries, for each task"),
            ("task_curve", [[-1]], "an accuracy is -1"),
            ("config", {"method": "x"}, "'tasks' is missing"),
        ],
    )
    def test_damaged_results_are_refused(self, tmp_path, key, value, message):
        result().save(tmp_path, picture=False)
        file = tmp_path / "result.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
        with pytest.raises(ValueError, match=message):
            Result.load(file)

    def test_results_of_older_versions_load_without_what_they_lack(self, tmp_path):
        result().save(tmp_path, picture=False)
        file = tmp_path / "result.json"
        content = json.loads(file.read_text())
        for key in ("before", "untrained", "steps", "task_curve", "chance"):
            del content[key]
        file.write_text(json.dumps(content))
        theirs = Result.load(file)
        assert np.isnan(theirs.before).all()
        assert np.isnan(theirs.untrained).all()
        assert theirs.steps == theirs.task_curve == theirs.chance == []
        assert math.isnan(theirs.forward_transfer)
        assert "forward transfer" not in str(theirs)

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"result\.json: no such file"):
            Result.load(tmp_path)
        with pytest.raises(FileNotFoundError, match="expected a comparison"):
            Comparison.load(tmp_path / "nowhere")

    def test_what_is_no_path(self):
        for use in (result().save, Result.load, result().plot):
            with pytest.raises(ValueError, match="must be a path, such as 'runs/ewc', got 5$"):
                use(5)

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OSError, match="is a file, not a folder"):
            result().save(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"


class TestComparison:
    def test_other_tasks_or_epochs_cannot_be_compared(self):
        with pytest.raises(ValueError, match=r"a: 3 tasks of 2 epochs, b: 3 tasks of 5 epochs"):
            Comparison({"a": result(), "b": result(epochs=5)})

    def test_its_items_are_labels_and_results(self):
        runs = {"ewc": result(), "si": result("si")}
        assert [*Comparison(runs).items()] == [*runs.items()]

    def test_tables_for_papers(self):
        runs = {"ewc": result(), r"50%_a|$b\{": result("si", done=1)}
        table = Comparison(runs).table
        titles = ["method", "strength", "accuracy", "forget", "BWT", "FWT", "LA", "min-ACC"]
        cells = ["ewc", "2.5", "0.7700", "0.1500", "-0.1500", "+0.0500", "0.8700", "0.7200"]
        lines = table("markdown").splitlines()
        assert lines[0] == f"| {' | '.join([*titles, 'time'])} |"
        assert lines[2] == f"| {' | '.join([*cells, '2.5 s'])} |"
        assert lines[3].startswith(r"| 50%_a\|$b\{ | 2.5 | 0.8800 (1 of 3) | - |")
        lines = table("latex").splitlines()
        assert lines[0] == r"\begin{tabular}{lrlrrrrrr}"
        assert lines[4] == " & ".join([*cells, "2.5 s"]) + r" \\"
        assert lines[5].startswith(r"50\%\_a|\$b\textbackslash{}\{ & 2.5 & 0.8800 (1 of 3)")
        with pytest.raises(ValueError, match=r"'format' of Comparison.table: 'html' \(valid"):
            table("html")

    def test_csv_and_data_frame_have_all_metrics_in_full(self):
        pandas = pytest.importorskip("pandas")
        joint = result("joint")
        joint.config["strength"] = None
        ours = Comparison({"ewc": result(), "joint": joint, "si": result("si", done=1)})
        read = pandas.read_csv(io.StringIO(ours.table("csv")))
        frame = ours.to_dataframe()
        assert [*frame.columns] == [*read.columns, "seconds"]
        assert [*read["method"]] == [*frame["method"]] == ["ewc", "joint", "si"]
        for each in (read, frame):
            assert each["accuracy"].tolist() == [r.average_accuracy[-1] for _, r in ours._ranked()]
            assert each["worst_accuracy"][0] == ours["ewc"].worst_accuracy
            assert each["tasks"].tolist() == [3, 3, 1]
            assert each["forgetting"].isna().tolist() == [False, False, True]
            assert each["intransigence"][0] == pytest.approx(-0.02)
            assert math.isnan(each["strength"][1])

    def test_an_unknown_label_suggests_the_nearest(self):
        with pytest.raises(ValueError, match=r"unknown result 'ewk'.*'ewc'"):
            Comparison({"ewc": result()})["ewk"]


class TestFromAccuracy:
    def test_metrics_table_and_pictures_of_a_matrix_from_elsewhere(self, tmp_path):
        rows = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.1], [0.6, 0.5, 1.0]]
        ours = Result.from_accuracy(rows, method="si", scenario="permuted", incremental="class")
        assert np.isnan(ours.accuracy[0, 1:]).all()  # tasks that were not learned yet
        assert ours.average_accuracy == ours.curve == pytest.approx([0.9, 0.75, 0.7])
        assert ours.forgetting == pytest.approx(0.3)
        assert ours.complete
        assert str(ours).startswith(
            "si on permuted, class-incremental: average accuracy 0.7000 after 3 tasks\n"
        )
        assert ours.title == "Permuted, class-incremental"
        assert not str(ours).splitlines()[-1].endswith(" s")  # nothing of time is known
        ours.save(tmp_path)
        assert (tmp_path / "matrix.png").exists()
        assert str(Result.load(tmp_path)) == str(ours)

    def test_tasks_that_were_not_learned_yet(self):
        ours = Result.from_accuracy([[0.9, NAN], [NAN, NAN]])
        assert (ours.complete, ours.average_accuracy) == (False, [0.9])

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([[0.9, 0.8]], r"matrix \[T, T\], got shape \[1, 2\]"),
            ([], r"matrix \[T, T\], got shape \[0\]"),
            ([[90.0]], "fractions between 0 and 1, got 90; divide per cents by 100"),
            ([[0.9, NAN], [NAN, 0.8]], "must have a number for each task j <= k"),
            ([["high"]], "must be a matrix of numbers"),
        ],
    )
    def test_what_is_no_accuracy_matrix(self, rows, message):
        with pytest.raises(ValueError, match=message):
            Result.from_accuracy(rows)
