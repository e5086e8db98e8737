"""What is checked where a user hands it in, and lines on stderr."""

import re

import pytest

from clext.core.checks import as_path, check_memory, integer, unknown_name
from clext.core.console import has_terminal, say
from clext.core.names import METHOD_OPTIONS, part_names


def test_a_count_is_below_what_any_machine_holds_and_a_seed_may_be_any():
    assert integer("replay", "budget", 2**40 - 1, minimum=1) == 2**40 - 1
    assert integer("train", "seed", 2**128, minimum=0) == 2**128
    with pytest.raises(ValueError, match=r"^replay: budget must be .* and < 1,099,511,627,776"):
        integer("replay", "budget", 2**40, minimum=1)


def test_memory_is_compared_with_that_of_the_machine(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2**18, "SC_PAGE_SIZE": 4096}.get)  # 1 GiB
    check_memory("scp", "slices", 3, 2**28)
    with pytest.raises(ValueError, match="slices=3 takes at least 2 GiB, more than the 1 GiB of"):
        check_memory("scp", "slices", 3, 2**29)


@pytest.mark.parametrize("name", ["lam", "lambda_", "ewc_lambda", "lambda_reg"])
def test_the_weight_of_the_penalty_goes_by_other_names(name):
    assert "did you mean 'strength'?" in str(unknown_name("option", name, METHOD_OPTIONS["ewc"]))
    assert "strength" not in str(unknown_name("option", name, METHOD_OPTIONS["gem"]))


@pytest.mark.parametrize("name", ["latent_", "slam"])
def test_not_all_names_with_these_letters_do(name):
    assert "mean 'strength'" not in str(unknown_name("option", name, METHOD_OPTIONS["dgr"]))


def test_methods_may_be_written_in_capitals():
    assert part_names("EWC + Replay") == part_names(["EWC", "Replay"]) == ["ewc", "replay"]


def test_a_home_that_there_is_not_is_one_sentence():
    sentence = "out: the home folder in '~nosuchuser/x' is not known here; write the folder in full"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        as_path("~nosuchuser/x", "out")


def test_lines_that_nobody_reads_stop_nothing(monkeypatch, capsys):
    class Closed:
        def write(self, _text: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())
    say("unread")
    monkeypatch.setattr("sys.stderr", None)
    say("unread")
    assert not has_terminal()
    assert capsys.readouterr().out == ""
