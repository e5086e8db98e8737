"""Pages of results, and what a notebook shows of them."""

import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from click.testing import CliRunner
from made_results import result
from matplotlib.image import imread

from clext import Comparison, Sweep, cli
from clext.training.report import write_report
from clext.training.sweep_result import Run

HOSTILE = "<script>alert(1)</script>"


def sweep(*methods: str) -> Sweep:
    runs = {Run(name, 2.0, seed): result(name) for name in methods for seed in (0, 1)}
    for run, each in runs.items():
        each.config["seed"] = run.seed
    return Sweep([*runs], runs, {})


class Page(HTMLParser):
    """The elements of a page by name, what they refer to, and the words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.references += [v or "" for name, v in attrs if name.endswith(("src", "href"))]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


class TestReport:
    @pytest.fixture
    def folder(self, tmp_path):
        """A sweep, a comparison, a run and a damaged file."""
        sweep("ewc", "si").save(tmp_path / "swept")
        Comparison({"mine": result("ewc"), "theirs": result("si", done=1)}).save(tmp_path / "both")
        result("mas").save(tmp_path / "alone")
        (tmp_path / "alone" / "bad").mkdir()
        (tmp_path / "alone" / "bad" / "result.json").write_text("{")
        return tmp_path

    def test_has_each_outcome_once_and_says_what_cannot_be_read(self, folder):
        path = write_report(folder)
        assert path == folder / "report.html"
        page = read(path)
        assert page.elements.count("h2") == 4  # the runs of the sweep are in its table
        assert page.elements.count("svg") == 1 + (1 + 2 * 3) + 3
        said = "".join(page.words)
        for words in (
            "swept: Permuted digits: 2 methods and strengths, 4 runs",
            "both: Permuted digits: 2 methods",
            "alone: mas: Permuted digits",
            "alone/bad: not readable",
            "bad/result.json: not a JSON file",
            "0.7700 ± 0.0000",  # of the sweep
            "0.8800 (1 of 3)",  # of the comparison
        ):
            assert words in said
        assert not [*folder.glob(".*")]

    def test_needs_no_other_file_and_cannot_load_one(self, folder):
        path = write_report(folder)
        references = read(path).references
        assert references
        # Places in the page, and the colours of a heat map, which are in it.
        assert {
            reference.partition("base64")[0] for reference in references if reference[0] != "#"
        } == {"data:image/png;"}
        assert "default-src 'none'" in path.read_text()
        assert "url(http" not in path.read_text()

    def test_settings_are_those_that_all_runs_have(self, folder):
        rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td>", self.section(folder, "swept")))
        assert rows["scenario"] == "permuted"
        assert rows["data.name"] == "digits"
        assert {"seed", "method"} & rows.keys() == set()
        of_one = self.section(folder, "alone")
        assert "<tr><th>method</th><td>mas</td></tr>" in of_one

    def section(self, folder, name: str) -> str:
        sections = write_report(folder).read_text().split("<h2 ")[1:]
        return next(section for section in sections if f">{name}: " in section)

    @pytest.mark.parametrize("name", [HOSTILE, r"$\frac{", '" onload="alert(1)', "--><svg>"])
    def test_names_are_text(self, tmp_path, name):
        ours = result()
        ours.config |= {"scenario": name, name: name, "method_options": {name: name}}
        ours.stopped = name
        page = read(Comparison({name: ours}).to_html(tmp_path / "new" / "page.html"))
        assert "script" not in page.elements
        assert page.elements.count("svg") == 4
        assert name in "".join(page.words)

    def test_each_kind_writes_a_page_of_its_own(self, tmp_path):
        for outcome, pictures in ((result(), 3), (sweep("ewc"), 1)):
            page = read(outcome.to_html(tmp_path / "page.html"))
            assert page.elements.count("svg") == pictures
        nothing = Sweep([Run("ewc", None, 0)], {}, {Run("ewc", None, 0): "no memory"})
        page = read(nothing.to_html(tmp_path / "page.html"))
        assert "ewc/seed-0: no memory" in "".join(page.words)

    def test_the_command_writes_it(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        outcome = CliRunner().invoke(cli.main, ["report", "."])
        assert (outcome.exit_code, outcome.stdout) == (0, "Written: report.html\n")
        outcome = CliRunner().invoke(cli.main, ["report", "alone", "--out", "new/page.html"])
        assert outcome.exit_code == 0
        assert read(folder / "new" / "page.html").elements.count("h2") == 2

    def test_a_folder_without_results_is_one_sentence(self, tmp_path):
        outcome = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
        assert outcome.exit_code == 2
        assert outcome.stderr.startswith("Error: report: expected a folder with sweep.json, comp")
        assert outcome.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


class TestNotebook:
    @pytest.mark.parametrize(
        "outcome", [result(), Comparison({"<b>": result()}), sweep("ewc")], ids=["r", "c", "s"]
    )
    def test_shows_the_table_and_the_picture(self, outcome):
        picture = imread(BytesIO(outcome._repr_png_()))
        assert picture.shape[1] > 1000
        assert np.ptp(picture[..., :3]) == 1  # from black to white
        page = Page(outcome._repr_html_())
        assert page.elements == ["pre", "img"]
        assert page.references[0].startswith("data:image/png;base64,iVBOR")
        assert "".join(page.words) == str(outcome)

    def test_of_a_sweep_without_results_there_is_no_picture(self):
        run = Run("ewc", None, 0)
        nothing = Sweep([run], {}, {run: "no memory"})
        assert nothing._repr_png_() is None
        assert Page(nothing._repr_html_()).elements == ["pre"]
