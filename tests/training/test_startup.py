"""What is imported when: nothing heavy before it is needed, and everything under its name."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import clext
from clext import cli
from clext.core import names
from clext.methods.parts.options import option_names
from clext.training import settings

HEAVY = ("torch", "torch._dynamo", "scipy", "sklearn", "matplotlib", "matplotlib.pyplot")


def modules_after(code: str) -> list[str]:
    """Which of the heavy modules a new process has imported after `code`."""
    code += f"\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_clext_imports_no_torch():
    assert modules_after("import clext; dir(clext); clext.__version__") == []


def test_help_and_wrong_options_do_not_wait_for_torch():
    code = """
from clext.cli import main
def clext(command, code):
    try:
        main(command.split())
    except SystemExit as end:
        assert end.code == code, command
for command in ("", "train", "compare", "sweep", "report", "info"):
    clext(f"{command} --help", 0)
clext("--version", 0)
for wrong in (
    "train --method ewx", "train --option xii=1", "train --tasks x", "train --tasks 0",
    "train --dataset minst", "compare --methods si,ewx", "info --method ewx",
    "sweep --methods ewx", "sweep --strengths x", "sweep --seeds x", "sweep --tasks 0",
):
    clext(wrong, 2)
"""
    assert modules_after(code) == []


def test_a_method_costs_torch_and_no_more():
    assert modules_after("import clext; clext.SI; clext.GEM") == ["torch"]


def test_pictures_touch_no_global_state_of_matplotlib():
    code = "from clext.training.plots import plot_curves; plot_curves({'ewc': [0.5]}, 1, 1, '')"
    assert modules_after(code) == ["matplotlib"]


def test_a_missing_compiled_module_is_one_sentence_at_first_use():
    code = """
import sys
sys.modules["clext._build"] = None
import clext
from clext.cli import main
try:
    clext.SI
except ImportError as error:
    print(error)
main(["info"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    for said in (run.stdout, run.stderr):
        assert "has no compiled module; run `pip install .`" in said
        assert said.count("\n") == 1


class TestNames:
    def test_every_public_name_is_there(self):
        assert all(getattr(clext, name) is not None for name in clext.__all__)
        assert set(dir(clext)) == set(clext.__all__)
        with pytest.raises(AttributeError, match="module 'clext' has no attribute 'EWX'"):
            _ = clext.EWX

    def test_type_checkers_see_the_same_names(self):
        tree = ast.parse(Path(clext.__file__).read_text())
        block = next(node for node in tree.body if isinstance(node, ast.If))
        seen = {alias.name for node in block.body for alias in node.names}
        assert seen | {"__version__"} == set(clext.__all__)

    def test_reference_is_a_module_of_clext_too(self):
        import clext.reference
        from clext.reference import quadratic_penalty

        assert clext.reference is clext.ops.reference
        assert quadratic_penalty is clext.ops.reference.quadratic_penalty

    def test_methods_and_their_options_are_those_of_the_classes(self):
        classes = {name: tuple(option_names(kind)) for name, kind in clext.METHODS.items()}
        assert classes == names.METHOD_OPTIONS
        assert set(names.DEFAULT_METHODS) < clext.METHODS.keys()

    def test_settings_are_in_the_command_line_and_the_signatures(self):
        assert {*cli._SETTINGS, "progress", "loss", "batch_transform"} == set(settings.NAMES)
        for function in (clext.train, clext.compare):
            parameters = inspect.signature(function).parameters
            assert parameters["batch_size"].default == 128
            assert set(settings.NAMES) < parameters.keys()
        of_sweep = inspect.signature(clext.sweep).parameters
        assert set(settings.NAMES) - of_sweep.keys() == {"seed"}
