"""What every method keeps is what it says, and `clext info --method` says it."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import clext
from clext import METHODS, cli, optim
from clext.data.datasets import Batches, Split
from clext.methods.parts.state import ParameterState
from clext.training.describe import (
    LETTERS,
    describe_method,
    letters_of,
    memory_bytes,
    memory_formulas,
    option_values,
)

FEATURES, CLASSES, TASKS, EXAMPLES = 6, 2, 3, 24
SMALL = {"per_task": 5, "budget": 12}
CASES = {
    **{name: (name, {}) for name in METHODS},
    "rwalk released": ("rwalk", {"variant": "released"}),
    "ewc all": ("ewc", {"anchors": "all"}),
}
# Beside tensors of the size of the data or the model: counters, means and states of generators.
_SMALL_CHANGE = 64


def tensors_in(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from `thing`, each storage once."""
    if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.FunctionType):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from tensors_in(key, seen)
            yield from tensors_in(value, seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for value in thing:
            yield from tensors_in(value, seen)
    elif isinstance(thing, types.MethodType):
        yield from tensors_in(thing.__self__, seen)
    elif hasattr(thing, "__dict__"):
        yield from tensors_in(vars(thing), seen)


def held(method: object, excluded: object) -> int:
    """Bytes that the method has beside `excluded`, without the gaps that align flat buffers."""
    seen: set[int] = set()
    foreign = {t.untyped_storage().data_ptr() for t in tensors_in(excluded, seen)}
    storages: dict[int, int] = {}
    for tensor in tensors_in(method, seen):
        place = tensor.untyped_storage().data_ptr()
        if place not in foreign:
            size = tensor.numel() * tensor.itemsize
            storages[tensor.data_ptr()] = max(size, storages.get(tensor.data_ptr(), 0))
    return sum(storages.values())


def train(name: str, options: dict[str, object], way: str):
    """Three tasks, and a step of a fourth: what is made within a task is there too.

    Returns model, method and the data of the fourth task, which is all that the caller still has.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES * (TASKS + 1))
    )
    kind = METHODS[name]
    own = {key: value for key, value in SMALL.items() if key in option_values(kind)}
    method = kind(model, **own, **options)
    for task in range(TASKS + 1):
        classes = range(CLASSES * task, CLASSES * (task + 1))
        inputs = torch.rand(EXAMPLES, FEATURES)
        labels = torch.arange(EXAMPLES) % CLASSES + classes.start
        active = range(classes.stop)
        given = (inputs, labels)
        examples = method.begin_task(given, block=classes, active=active) or given
        fused = way == "fused"
        optimizer = (
            optim.Adam(model.parameters(), lr=1e-2, method=method)
            if fused
            else torch.optim.Adam(model.parameters(), lr=1e-2)
        )
        for rows in torch.randperm(len(examples[0])).split(8)[: 1 if task == TASKS else None]:
            method.loss(*(entry[rows] for entry in examples)).backward()
            if not fused:
                method.add_penalty_grad_()
            optimizer.step()
            if not fused:
                method.update()
            optimizer.zero_grad()
        if task < TASKS:
            method.consolidate(Batches(Split(*given), 8))
    return model, method, given


@pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")
@pytest.mark.parametrize("way", ["fused", "apart"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_the_formulas_say(case, way):
    name, options = CASES[case]
    model, method, given = train(name, options, way)
    values = {"T": TASKS, "N": EXAMPLES, "X": FEATURES, "O": model[-1].out_features}
    values |= letters_of(method, model)
    formulas = memory_formulas(method)
    expected = sum(memory_bytes(formula, values) for formula in formulas.values())
    found = held(method, [model, given])
    assert abs(found - expected) <= _SMALL_CHANGE, (found, formulas, values)


def test_the_walk_finds_what_is_kept_anywhere():
    class Keeper:
        def __init__(self) -> None:
            self.inner = {
                "a": [torch.zeros(3)],
                "state": ParameterState({"w": nn.Parameter(torch.zeros(2))}, ["x"]),
            }

    keeper = Keeper()
    assert held(keeper, []) == 3 * 4 + 2 * 4 + 2 * 4
    assert held(keeper, keeper.inner["a"]) == 2 * 4 + 2 * 4


@pytest.mark.parametrize("name", METHODS)
def test_info_shows_options_memory_and_letters_on_one_screen(name):
    outcome = CliRunner().invoke(cli.main, ["info", "--method", name])
    assert outcome.exit_code == 0, outcome.output
    text = outcome.stdout
    assert text.startswith(f"{name}: ")
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 110
    method = METHODS[name](nn.Linear(2, 2))
    for option, value in option_values(METHODS[name]).items():
        assert f"\n  {option:<20} {value} " in text
    for item, formula in memory_formulas(method).items():
        assert f"  {item:<20} {formula}" in text
        for letter in LETTERS:
            if letter in formula:
                assert LETTERS[letter] in text


def test_the_figures_are_those_of_the_course():
    text = describe_method("gem")
    assert "P = 1,462,538: trainable parameters" in text
    rows = {line.split()[0]: line.split()[-2:] for line in text.splitlines() if "iB" in line}
    examples, gradients = 5 * 256 * (4 * 784 + 8), 4 * 5 * 1_462_538
    assert rows["examples"] == [f"{examples / 2**20:.1f}", "MiB"]
    assert rows["gradients"] == [f"{gradients / 2**20:.1f}", "MiB"]
    assert rows["together"] == [f"{(examples + gradients) / 2**20:.1f}", "MiB"]


def test_info_of_a_combination_has_both_and_bad_names_are_one_line():
    text = describe_method("ewc+replay")
    assert text.startswith("ewc: ")
    assert "\n\nreplay: " in text
    for method, message in (("ewx", "unknown method 'ewx'"), ("ewc+si", "does not combine")):
        outcome = CliRunner().invoke(cli.main, ["info", "--method", method])
        assert outcome.exit_code == 2
        assert message in outcome.stderr
        assert outcome.stdout == ""


def test_what_an_optimizer_makes_superfluous_is_not_counted():
    model = nn.Linear(2, 2)
    method = clext.SI(model)
    assert "previous" in memory_formulas(method)
    optim.Adam(model.parameters(), method=method)
    assert "previous" not in memory_formulas(method)
