"""The pictures of results: lines, names, axes, the heat map."""

import math

import numpy as np
import pytest
from made_results import result
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.path import Path
from matplotlib.text import Text

from clext import Comparison, Sweep
from clext.training.plots import _STYLES, spread
from clext.training.sweep_result import Run

NAN = math.nan


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

    def test_many_names_at_the_top_leave_the_lines_their_room(self):
        one, many = (
            Comparison({f"run {i}": result(f"run {i}") for i in range(count)}).plot()
            for count in (1, 14)
        )
        for figure in (one, many):
            FigureCanvasAgg(figure).draw()
        heights = [figure.axes[0].get_window_extent().height for figure in (one, many)]
        assert heights[1] > 0.95 * heights[0]

    def test_a_long_title_is_broken_and_not_cut(self):
        ours = result(tasks=2)
        ours.config["scenario"] = "permuted and then some more of it " * 4
        for figure in (ours.plot(), ours.plot_matrix()):
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            title = figure.axes[0]._left_title.get_window_extent(canvas.get_renderer())
            assert title.x1 <= figure.bbox.x1
            assert title.y1 <= figure.bbox.y1

    @pytest.mark.parametrize("done", [0, 1])
    def test_unfinished_runs_can_be_drawn(self, done, tmp_path):
        result(done=done).plot(tmp_path / "new" / "picture.pdf")
        assert (tmp_path / "new" / "picture.pdf").exists()

    def test_a_run_that_ended_early_is_named_at_the_margin_and_says_how_far_it_came(self):
        axes = Comparison({"ewc": result(), "si": result("si", done=1)}).plot().axes[0]
        names = {text.get_text(): text for text in axes.texts if "0." in text.get_text()}
        assert set(names) == {"ewc 0.750", "si 0.790 (1 of 3)"}
        assert {text.xy[0] for text in names.values()} == {6}

    @pytest.mark.parametrize(
        ("tasks", "epochs", "ticks"),
        [(5, 10, [10, 20, 30, 40, 50]), (3, 1, [1, 2, 3]), (1, 4, [1, 2, 3, 4]), (1, 1, [1])],
    )
    def test_epochs_are_counted_at_the_borders_of_tasks(self, tasks, epochs, ticks):
        axes = result(tasks=tasks, epochs=epochs).plot().axes[0]
        assert list(axes.get_xticks()) == ticks
        assert len(result(tasks=50, epochs=epochs).plot().axes[0].get_xticks()) <= 12

    @pytest.mark.parametrize("name", ["run {}", "ewc ({})"])
    def test_a_style_of_its_own_for_every_line_of_a_large_comparison(self, name):
        names = [name.format(number) for number in range(12)]
        axes = (
            Comparison({each: result(each) for each in [*names, "si", "lwf+replay"]}).plot().axes[0]
        )
        lines = [line for line in axes.lines if len(line.get_xdata()) == 6]
        assert len(lines) == 14
        assert len({line.get_color() for line in lines}) == 14
        assert lines[12].get_color() == _STYLES["si"].color

    def test_a_method_keeps_its_style_and_a_combination_takes_its_seconds_if_free(self):
        def looks(*names: str) -> dict[str, tuple]:
            lines = Comparison({name: result(name) for name in names}).plot().axes[0].lines
            curves = [line for line in lines if len(line.get_xdata()) == 6]
            return {
                name: (line.get_color(), line.get_marker(), line._dash_pattern)
                for name, line in zip(names, curves, strict=True)
            }

        known = tuple(_STYLES)
        alone = {name: looks(name)[name] for name in known}
        assert looks(*known) == alone
        assert len({color for color, _, _ in alone.values()}) == len(known)
        assert len({marker for _, marker, _ in alone.values()}) == len(known)
        assert looks("ewc+replay")["ewc+replay"] == alone["replay"]
        both = looks("ewc+replay", "replay", "si+replay")
        assert both["replay"] == alone["replay"]
        assert len({style[:2] for style in both.values()}) == 3

    @pytest.mark.parametrize("name", [r"$\frac{", "costs in $ and $"])
    def test_names_are_written_as_they_stand(self, tmp_path, name):
        ours = result()
        ours.config["scenario"] = name
        ours.config["method"] = name  # twice in the titles, as around a formula
        pair = Comparison({name: ours, "si": result("si")})
        for picture in (pair.plot, ours.plot, ours.plot_tasks, ours.plot_matrix):
            for form in ("png", "svg"):
                picture(tmp_path / f"picture.{form}")
            title = picture().axes[0]._left_title
            assert title._preprocess_math(title.get_text())[1] is False
            assert name[1:] in title.get_text().replace(r"\$", "$")


def shown(outcome) -> tuple[list, float, str]:
    """The levels of chance, where the axis of accuracy begins, and its label."""
    axes = outcome.plot().axes[0]
    levels = [
        (*segment[:, 0].tolist(), segment[0, 1])
        for collection in axes.collections
        for segment in collection.get_segments()
    ]
    return levels, axes.get_ylim()[0], axes.get_ylabel()


class TestLevels:
    """Where the axis of accuracy begins, and chance."""

    @pytest.mark.parametrize("kind", ["result", "comparison", "sweep"])
    def test_chance_is_drawn_for_each_task(self, kind):
        ours = result()
        ours.curve[:] = [0.6, 0.7, 0.4, 0.5, 0.3, 0.4]
        ours.chance[:] = [0.5, 0.25, 0.125]
        run = Run("ewc", None, 0)
        kinds = {"comparison": Comparison({"ewc": ours}), "sweep": Sweep([run], {run: ours}, {})}
        levels, low, label = shown(kinds.get(kind, ours))
        assert levels == [(0, 2, 0.5), (2, 4, 0.25), (4, 6, 0.125)]
        assert low == 0
        assert label == "Average accuracy over the tasks seen"

    @pytest.mark.parametrize(
        ("least", "chance", "begins", "words"),
        [
            (0.4, 0.1, 0, ""),
            (0.5, 0.1, 0, ""),
            (0.7, 0.5, 0.47, "\n(axis does not begin at 0)"),
            (0.9, 0.1, 0.87, "\n(axis does not begin at 0; chance 0.10 is below)"),
            (0.9, None, 0.87, "\n(axis does not begin at 0)"),
        ],
    )
    def test_an_axis_that_does_not_begin_at_zero_says_so(self, least, chance, begins, words):
        ours = result()
        ours.curve[:] = [least, *[1.0] * 5]
        ours.chance[:] = [] if chance is None else [chance] * 3
        levels, low, label = shown(ours)
        assert low == pytest.approx(begins, abs=0.03)
        assert label.removeprefix("Average accuracy over the tasks seen") == words
        assert len(levels) == (3 if chance and low <= chance else 0)
        lines = ours.plot().axes[0].lines
        cut = [line for line in lines if isinstance(line.get_marker(), Path)]
        assert len(cut) == (low > 0)

    def test_chance_of_runs_on_other_tasks_is_not_drawn(self):
        one, other = result("ewc"), result("si")
        one.curve[0] = other.curve[0] = 0.1
        one.chance[:], other.chance[:] = [0.5] * 3, [0.1] * 3
        assert shown(Comparison({"ewc": one, "si": other}))[0] == []
        other.chance[:] = []  # saved by an older version
        assert len(shown(Comparison({"ewc": one, "si": other}))[0]) == 3


class TestTasks:
    def lines(self, ours) -> list[tuple[list[int], list[float]]]:
        lines = ours.plot_tasks().axes[0].lines
        drawn = [line for line in lines if line.get_color() != "#999999"]
        curves = [line for line in drawn if not isinstance(line.get_marker(), Path)]
        return [([*map(int, line.get_xdata())], [*line.get_ydata()]) for line in curves]

    def test_a_line_for_each_task_from_where_it_was_begun(self):
        ours = result(tasks=2)
        ours.task_curve = [[0.5], [0.6], [0.4, 0.3], [0.2, 0.7]]
        ours.chance[:] = [0.1, 0.1]
        assert self.lines(ours) == [([1, 2, 3, 4], [0.5, 0.6, 0.4, 0.2]), ([3, 4], [0.3, 0.7])]
        axes = ours.plot_tasks().axes[0]
        texts = [text.get_text() for text in axes.texts]
        assert texts == ["task 1", "task 2", "chance 0.10", "task 1 0.200", "task 2 0.700"]
        assert axes.get_ylabel() == "Accuracy on each task"

    def test_of_an_older_result_the_ends_of_tasks_are_known(self):
        curves = [([2, 4, 6], [0.87, 0.77, 0.67]), ([4, 6], [0.87, 0.77]), ([6], [0.87])]
        for drawn, known in zip(self.lines(result()), curves, strict=True):
            assert drawn[0] == known[0]
            assert drawn[1] == pytest.approx(known[1])

    @pytest.mark.parametrize("done", [0, 1])
    def test_an_unfinished_run_has_those_that_were_begun(self, done):
        ours = result(done=done)
        ours.task_curve = [[0.5], [0.6], [0.4, 0.3]][: 3 * done]
        assert [xs for xs, _ in self.lines(ours)] == [[1, 2, 3], [3]][: 2 * done]

    def test_each_of_many_tasks_has_a_line_and_some_have_names(self):
        ours = result(tasks=50, epochs=1)
        axes = ours.plot_tasks().axes[0]
        assert len(self.lines(ours)) == 50
        names = [text.get_text() for text in axes.texts if text.get_text().startswith("task ")]
        assert len(names) < 15


class TestHeatMap:
    def test_shows_each_accuracy_where_it_was_taken(self, tmp_path):
        ours = result(done=2)
        axes = ours.plot_matrix(tmp_path / "new" / "m.png").axes[0]
        assert (tmp_path / "new" / "m.png").stat().st_size > 5_000
        shown = axes.images[0].get_array()
        np.testing.assert_array_equal(shown.filled(NAN), ours.accuracy)
        canvas = FigureCanvasAgg(axes.figure)
        canvas.draw()
        boxes = [each.get_window_extent() for each in axes.figure.axes]
        assert boxes[1].height == pytest.approx(boxes[0].height, abs=1)  # the colour bar
        assert axes.get_tightbbox().x0 < 0.05 * axes.figure.bbox.width
        texts = {(*text.get_position(), text.get_text()) for text in axes.texts}
        assert texts == {(0, 0, "0.87"), (0, 1, "0.77"), (1, 1, "0.87")}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("Accuracy on task", "After learning task")

    def test_numbers_can_be_read_on_their_cells(self):
        ours = result(tasks=10)
        ours.accuracy[9] = np.linspace(0, 1, 10)
        axes = ours.plot_matrix().axes[0]
        image = axes.images[0]
        for text in axes.texts:
            j, k = map(int, text.get_position())
            cell = luminance(image.cmap(image.norm(ours.accuracy[k, j])))
            ink = luminance(to_rgba(text.get_color()))
            assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) > 4.5  # WCAG AA

    def test_many_tasks_have_no_numbers(self):
        axes = result(tasks=30).plot_matrix().axes[0]
        assert not axes.texts
        assert len(axes.get_xticks()) <= 11

    def test_is_saved_where_there_is_more_than_one_task(self, tmp_path):
        result().save(tmp_path / "many")
        for tasks in (3, 1):  # the second in the place of the first
            result(tasks=tasks).save(tmp_path / "one")
        names = ["accuracy.png", "matrix.png", "result.json", "tasks.png"]
        assert sorted(file.name for file in (tmp_path / "many").iterdir()) == names
        names = ["accuracy.png", "result.json"]
        assert sorted(file.name for file in (tmp_path / "one").iterdir()) == names


def luminance(color: tuple[float, ...]) -> float:
    """Relative luminance of a colour, as the guidelines for readable text define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class TestSpread:
    @pytest.mark.parametrize(
        ("places", "gap", "within", "expected"),
        [
            ([10.0, 0.0, 20.0], 5, None, [10.0, 0.0, 20.0]),  # far apart
            ([1.0, 0.0, 100.0], 10, None, [5.5, -4.5, 100.0]),  # around their mean
            ([0.0, 1.0, 12.0, 13.0, 14.0], 10, None, [-12, -2, 8, 18, 28]),  # groups that meet
            ([8.0, 9.0, 2.0], 2, (0, 9), [7.0, 9.0, 2.0]),
            ([0.0, 0.0, 9.0], 4, (0, 9), [0, 4, 9]),
            ([8.0, 8.0, 8.0], 4, (0, 9), [1, 5, 9]),
            ([8.0, 8.0, 8.0], 5, (0, 9), [3, 8, 13]),  # bounds with too little room do not count
        ],
    )
    def test_neighbours_move_just_far_enough(self, places, gap, within, expected):
        bounds = {} if within is None else {"within": within}
        assert spread(places, gap=gap, **bounds) == pytest.approx(expected)

    def test_order_is_kept(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            wanted = rng.uniform(0, 100, 8)
            moved = np.array(spread(list(wanted), gap=9))
            assert (moved.argsort() == wanted.argsort()).all()
            assert np.diff(np.sort(moved)).min() > 9 - 1e-9
