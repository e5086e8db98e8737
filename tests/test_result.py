"""Results: what is kept, how it reads, files and pictures."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from clext import Comparison, Result
from clext.plotting import spread

NAN = math.nan


def result(method: str = "ewc", tasks: int = 3, epochs: int = 2, done: int | None = None) -> Result:
    done = tasks if done is None else done
    accuracy = np.full((tasks, tasks), NAN)
    for k in range(done):
        accuracy[k, : k + 1] = 0.9 - 0.1 * (k - np.arange(k + 1)) - 0.01 * len(method)
    curve = [0.8 - 0.01 * e for e in range(done * epochs)]
    config = {
        "method": method,
        "strength": 2.5,
        "tasks": tasks,
        "epochs": epochs,
        "scenario": "permuted",
        "data": {"name": "digits"},
    }
    result = Result.empty(len(accuracy), config)
    result.accuracy[:], result.curve = accuracy, curve
    result.timings |= {"training": 2.0, "evaluation": 0.5}
    return result


class TestNumbers:
    def test_summary_numbers_come_from_the_accuracy_matrix(self):
        ours = result()
        assert ours.average_accuracy == pytest.approx([0.87, 0.82, 0.77])
        assert ours.forgetting == pytest.approx(0.15)
        assert ours.backward_transfer == pytest.approx(-0.15)
        assert ours.seconds == 2.5
        assert ours.complete

    def test_an_unfinished_run_says_so(self):
        ours = result(done=1)
        ours.stopped = "the power went out"
        assert not ours.complete
        assert ours.average_accuracy == pytest.approx([0.87])
        assert "after 1 of 3 tasks" in str(ours)
        assert "stopped early: the power went out" in str(ours)

    def test_nothing_done_can_still_be_read(self):
        assert "no task finished" in str(result(done=0))


class TestText:
    def test_the_table_shows_each_accuracy_where_it_was_taken(self):
        assert str(result()).splitlines() == [
            "ewc on permuted digits: average accuracy 0.7700 after 3 of 3 tasks, 2 epochs each",
            "",
            "accuracy on      task 1   task 2   task 3  average",
            "after task 1     0.8700                     0.8700",
            "after task 2     0.7700   0.8700            0.8200",
            "after task 3     0.6700   0.7700   0.8700   0.7700",
            "",
            "forgetting 0.1500, backward transfer -0.1500, 2.5 s (training 2.0, evaluation 0.5)",
        ]
        assert repr(result()) == str(result())

    def test_many_tasks_still_fit_a_terminal(self):
        text = str(result(tasks=30))
        assert max(map(len, text.splitlines())) < 100
        assert "after task 30" in text

    def test_a_comparison_lists_the_best_first_and_the_unfinished_last(self):
        runs = {"ewc": result("ewc"), "si": result("si"), "rwalk": result("rwalk", done=1)}
        lines = str(Comparison(runs)).splitlines()
        assert lines[0].split() == [
            "method",
            "strength",
            "accuracy",
            "forgetting",
            "BWT",
            "time",
        ]
        assert [line.split()[0] for line in lines[1:]] == ["si", "ewc", "rwalk"]
        assert lines[2].split() == ["ewc", "2.5", "0.7700", "0.1500", "-0.1500", "2.5", "s"]
        assert lines[3].split() == ["rwalk", "2.5", "0.8500", "-", "-", "2.5", "s"]


class TestFiles:
    @pytest.mark.parametrize("done", [0, 1, 3])
    def test_what_is_saved_is_loaded(self, tmp_path, done):
        ours = result(done=done)
        ours.stopped = "why" if done < 3 else None
        ours.save(tmp_path / "new" / "folder")
        for path in (tmp_path / "new/folder", tmp_path / "new/folder/result.json"):
            theirs = Result.load(path)
            np.testing.assert_array_equal(theirs.accuracy, ours.accuracy)
            assert theirs.accuracy.dtype == np.float64
            assert (theirs.curve, theirs.config) == (ours.curve, ours.config)
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
            ("[]", "expected a result saved by clext, found kind None"),
            ('{"kind": "comparison", "format": 1}', "found kind 'comparison'"),
            ('{"kind": "result", "format": 99}', "expected format 1, found 99"),
            ('{"kind": "result", "format": 1}', "not a complete result: 'accuracy' is missing"),
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
            ("accuracy", [[1.0]], r"shape \[1, 1\], not \[3, 3\]"),
            ("accuracy", "high", "not a valid result"),
            ("curve", [None], "not a valid result"),
            ("config", {"tasks": 3}, "lacks the method"),
            ("config", {"method": "x"}, "'tasks' is missing"),
        ],
    )
    def test_damaged_results_are_refused(self, tmp_path, key, value, message):
        result().save(tmp_path, picture=False)
        file = tmp_path / "result.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
        with pytest.raises(ValueError, match=message):
            Result.load(file)

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"result\.json: no such file"):
            Result.load(tmp_path)
        with pytest.raises(FileNotFoundError, match="expected a comparison"):
            Comparison.load(tmp_path / "nowhere")

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OSError, match="is a file, not a folder"):
            result().save(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"


class TestComparison:
    def test_other_tasks_or_epochs_cannot_be_compared(self):
        with pytest.raises(ValueError, match=r"a: 3 tasks of 2 epochs, b: 3 tasks of 5 epochs"):
            Comparison({"a": result(), "b": result(epochs=5)})

    def test_an_unknown_label_suggests_the_nearest(self):
        with pytest.raises(ValueError, match=r"unknown result 'ewk'.*'ewc'"):
            Comparison({"ewc": result()})["ewk"]


class TestPicture:
    def test_a_line_per_method_and_a_border_per_task(self):
        comparison = Comparison({name: result(name) for name in ("ewc", "si", "mine")})
        axes = comparison.plot().axes[0]
        curves = [line for line in axes.lines if len(line.get_xdata()) == 6]
        borders = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
        assert borders == [2, 4]
        assert [list(line.get_ydata()) for line in curves] == [result().curve] * 3
        looks = {(line.get_color(), line.get_marker()) for line in curves}
        assert len(looks) == 3
        texts = {text.get_text() for text in axes.texts}
        assert texts >= {"task 1", "task 2", "task 3", "ewc 0.750", "si 0.750", "mine 0.750"}

    def test_names_at_the_ends_do_not_overlap(self):
        figure = Comparison({name: result(name) for name in ("ewc", "si", "mas", "scp")}).plot()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        labels = [text for text in figure.axes[0].texts if "0." in text.get_text()]
        for label in labels:
            label.update_positions(canvas.get_renderer())
        # Text's own method: an annotation's would include its leader line.
        boxes = [Text.get_window_extent(label) for label in labels]
        assert len(boxes) == 4
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
            assert figure.bbox.x1 >= box.x1

    @pytest.mark.parametrize("done", [0, 1])
    def test_unfinished_runs_can_be_drawn(self, done, tmp_path):
        result(done=done).plot(tmp_path / "new" / "picture.pdf")
        assert (tmp_path / "new" / "picture.pdf").exists()

    def test_a_style_for_every_line_of_a_large_comparison(self):
        axes = Comparison({f"run {i}": result() for i in range(12)}).plot().axes[0]
        assert sum(len(line.get_xdata()) == 6 for line in axes.lines) == 12

    def test_no_display_and_no_global_state_is_touched(self, tmp_path):
        code = (
            "import sys, clext; from clext import Result;"
            f"Result.load({str(tmp_path)!r}).plot({str(tmp_path / 'x.png')!r});"
            "print('matplotlib.pyplot' in sys.modules)"
        )
        result().save(tmp_path)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (run.stdout.strip(), run.stderr) == ("False", "")


class TestSpread:
    def test_places_that_are_far_apart_stay(self):
        assert spread([10.0, 0.0, 20.0], gap=5) == [10.0, 0.0, 20.0]

    def test_neighbours_move_just_far_enough_around_their_mean(self):
        assert spread([1.0, 0.0, 100.0], gap=10) == [5.5, -4.5, 100.0]

    def test_groups_that_meet_become_one(self):
        places = spread([0.0, 1.0, 12.0, 13.0, 14.0], gap=10)
        assert np.diff(places) == pytest.approx([10] * 4)
        assert np.mean(places) == pytest.approx(8)

    def test_order_is_kept(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            wanted = rng.uniform(0, 100, 8)
            moved = np.array(spread(list(wanted), gap=9))
            assert (moved.argsort() == wanted.argsort()).all()
            assert np.diff(np.sort(moved)).min() > 9 - 1e-9
