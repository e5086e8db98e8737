"""Published results of methods that rehearse: rows for the tables, and Split MNIST."""

from __future__ import annotations

from functools import partial

from clext.methods import AGEM, DGR, GEM, ICaRL, Joint, LwF
from published.protocols import Protocol, Row, adam, iterations, sgd, unchanged
from published.released import ReleasedGEM

# The authors weigh old and new by the number of tasks.
_BY_TASKS = "the k-th task's own loss counts 1/k"
_LWF_NOTE = (
    f"{_BY_TASKS}; distillation is a mean over examples and outputs with the factor T^2, as in the "
    "code released with the paper"
)
_DGR_NOTE = f"{_BY_TASKS}; generator as wide as the model, learning at the same rate"
_LWF = partial(LwF, balance="tasks", temperature=2.0, scale="mean")
_PERMUTED_WIDTHS, _SPLIT_WIDTHS = (1000, 1000), (400, 400)


VAN_DE_VEN_ROWS = (
    Row("LwF", 72.64, 4.9, _LWF, adam(1e-4), "0.52", note=_LWF_NOTE),
    Row(
        "DGR",
        95.09,
        0.4,
        partial(DGR, hidden=_PERMUTED_WIDTHS, generator_lr=1e-4),
        adam(1e-4),
        "0.04",
        note=_DGR_NOTE,
    ),
    Row(
        "DGR with distillation",
        97.35,
        0.2,
        partial(DGR, distill=True, scale="none", hidden=_PERMUTED_WIDTHS, generator_lr=1e-4),
        adam(1e-4),
        "0.02",
        note=f"{_DGR_NOTE}; distillation without a factor",
    ),
    Row("joint", 97.59, 0.2, Joint, adam(1e-4), "0.02", note="the data of all tasks so far"),
)


# 25 examples of each class in theirs, 250 of all classes together in ours.
A_GEM_ROWS = (
    Row(
        "GEM",
        89.5,
        1.4,
        partial(GEM, per_task=250, margin=0.5),
        sgd(0.1),
        "0.48",
        note="250 examples a task; released code before August 2018: margin 0.5, no ridge",
    ),
    Row(
        "GEM with a ridge",
        None,
        0.0,
        partial(GEM, per_task=250, margin=0.5, ridge=1e-3),
        sgd(0.1),
        note="250 examples a task; margin and ridge of GEM's own authors' code",
    ),
    Row(
        "GEM, code of December 2018",
        None,
        0.0,
        partial(ReleasedGEM, per_task=250, margin=0.5),
        sgd(0.1),
        note="250 examples a task; steps in conflict leave the current gradient out",
    ),
    Row(
        "A-GEM",
        89.1,
        0.4,
        partial(AGEM, per_task=250, batch=256),
        sgd(0.1),
        "0.14",
        note="250 examples a task, 256 of all of them in a step",
    ),
)


def split_rows(name: str, published: dict[str, tuple[float, float]], **given: object) -> list[Row]:
    """A row for each setting: the published value and its tolerance."""
    return [
        Row(f"{name}, {setting}", value, tolerance, incremental=setting, **given)  # type: ignore[arg-type]
        for setting, (value, tolerance) in published.items()
    ]


SPLIT = Protocol(
    title="Split MNIST, five tasks of two digits",
    source="van de Ven and Tolias 2018 (arXiv:1809.10635), Table 3, without its spread; iCaRL "
    "by the same authors in 2019 (arXiv:1904.07734)",
    tasks=5,
    hidden=(400, 400),
    initialize=lambda _module: None,
    prepare=unchanged,
    batch_size=128,
    order=iterations(2000, 128),
    keep_optimizer=True,
    tolerance="chosen before the runs: 0.3 where tasks have heads, 5 and 3 for LwF with one head, "
    "2 for DGR with one, 1 for iCaRL",
    scenario="split",
    # Each of the published runs has its own pairs of digits, and which they are matters.
    shuffle_classes=True,
    rows=(
        *split_rows(
            "LwF",
            {"task": (99.60, 0.3), "domain": (71.02, 5.0), "class": (24.17, 3.0)},
            method=_LWF,
            optimizer=adam(1e-3),
            note=_LWF_NOTE,
        ),
        *split_rows(
            "DGR",
            {"task": (99.47, 0.3), "domain": (95.74, 2.0), "class": (91.24, 2.0)},
            method=partial(DGR, hidden=_SPLIT_WIDTHS, generator_lr=1e-3),
            optimizer=adam(1e-3),
            note=_DGR_NOTE,
        ),
        *split_rows(
            "iCaRL",
            {"class": (94.57, 1.0)},
            method=partial(ICaRL, budget=2000, temperature=2.0),
            optimizer=adam(1e-3),
            note="budget 2000; the released code softens with temperature 2",
        ),
    ),
)
