"""Published results, with the protocols they were measured by.

Where the authors' released code differs from their paper, the code is followed, since it made the
number, and the difference is named in the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from clext.data.datasets import Batches, Dataset, Split
from clext.methods import (
    AGEM,
    DER,
    DGR,
    EWC,
    GEM,
    KFAC,
    L2,
    MAS,
    SI,
    Baseline,
    DERpp,
    ICaRL,
    Joint,
    LwF,
    Method,
    Replay,
    RWalk,
)
from published.protocols import Protocol, Row, adam, epochs, iterations, sgd, unchanged
from published.released import ReleasedGEM, ReleasedSI, RunningFisherEWC

# ---------------------------------------------------------------------- Zenke et al. 2017


def glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def si_row(c: float, published: float, tolerance: float) -> Row:
    si = partial(ReleasedSI, strength=c, xi=0.1)
    note = "released code: clamp='total', and the loss of Keras" if c else ""
    return Row(f"c={c:g}", published, tolerance, si if c else Baseline, adam(1e-3), note=note)


def si_row_of_clext(c: float, clamp: str) -> Row:
    si = partial(SI, strength=c, xi=0.1, clamp=clamp)
    return Row(f"c={c:g}, clamp by {clamp}", None, 0.0, si, adam(1e-3), note=f"clamp={clamp!r}")


ZENKE = Protocol(
    title="SI, Permuted MNIST, ten tasks",
    source="Zenke et al. 2017 (arXiv:1703.04200), the results stored with the authors' code",
    tasks=10,
    hidden=(2000, 2000),
    initialize=glorot,
    prepare=unchanged,
    first_is_permuted=False,
    batch_size=256,
    order=epochs(20, 256),
    keep_optimizer=True,
    tolerance="one published run each and no spread: 1 for c > 0.01, 2 for 0.01, 10 without",
    rows=(
        si_row(0.0, 57.41, 10.0),
        si_row(0.01, 92.00, 2.0),
        si_row(0.02, 93.91, 1.0),
        si_row_of_clext(0.02, "total"),
        si_row_of_clext(0.02, "task"),
        si_row(0.1, 96.94, 1.0),
        si_row_of_clext(0.1, "task"),
    ),
)


# ---------------------------------------------------------------------- van de Ven and Tolias 2018

# The authors weigh old and new by the number of tasks.
_BY_TASKS = "the k-th task's own loss counts 1/k"
_LWF_NOTE = (
    f"{_BY_TASKS}; distillation is a mean over examples and outputs with the factor T^2, as in the "
    "code released with the paper"
)
_DGR_NOTE = f"{_BY_TASKS}; generator as wide as the model, learning at the same rate"
_LWF = partial(LwF, balance="tasks", temperature=2.0, scale="mean")


def padded(data: Dataset) -> tuple[Split, Split]:
    """28x28 images in the middle of 32x32 zeros; the zeros are permuted too."""

    def pad(split: Split) -> Split:
        images = split.inputs.view(-1, 28, 28)
        return Split(nn.functional.pad(images, (2, 2, 2, 2)).flatten(1), split.labels)

    return pad(data.train), pad(data.test)


@torch.no_grad()
def predicted(model: nn.Module, split: Split) -> Batches:
    """The data with the classes that the model finds most likely, for the Fisher information."""
    labels = torch.cat([model(inputs).argmax(1) for inputs, _ in Batches(split, 1000)])
    return Batches(Split(split.inputs, labels), 500)


VAN_DE_VEN = Protocol(
    title="Domain-incremental Permuted MNIST, ten tasks",
    source="van de Ven and Tolias 2018 (arXiv:1809.10635), Table 4",
    tasks=10,
    hidden=(1000, 1000),
    initialize=lambda _module: None,
    prepare=padded,
    batch_size=128,
    order=iterations(5000, 128),
    keep_optimizer=True,
    tolerance="three standard deviations of one run: the published spread is the standard error of "
    "a mean, taken as that of ten runs",
    rows=(
        Row("none", 78.51, 2.3, Baseline, adam(1e-4), "0.24"),
        Row(
            "EWC",
            94.31,
            1.0,
            partial(EWC, strength=250.0, anchors="all"),
            adam(1e-4),
            "0.11",
            predicted,
            "lambda 500 on half the sum; Fisher of the predicted class, as in the authors' code",
        ),
        Row(
            "online EWC",
            94.42,
            1.2,
            partial(EWC, strength=450.0, gamma=0.9),
            adam(1e-4),
            "0.13",
            predicted,
            "lambda 1000 on half of gamma times the sum; Fisher of the predicted class",
        ),
        Row(
            "SI",
            95.33,
            1.0,
            partial(SI, strength=5.0, xi=0.1),
            adam(1e-4),
            "0.11",
            note="c = 5, xi = 0.1; the released code leaves importances below 0, ours has none",
        ),
        Row("LwF", 72.64, 4.9, _LWF, adam(1e-4), "0.52", note=_LWF_NOTE),
        Row(
            "DGR",
            95.09,
            0.4,
            partial(DGR, hidden=(1000, 1000), generator_lr=1e-4),
            adam(1e-4),
            "0.04",
            note=_DGR_NOTE,
        ),
        Row(
            "DGR with distillation",
            97.35,
            0.2,
            partial(DGR, distill=True, scale="none", hidden=(1000, 1000), generator_lr=1e-4),
            adam(1e-4),
            "0.02",
            note=f"{_DGR_NOTE}; distillation without a factor",
        ),
        Row("joint", 97.59, 0.2, Joint, adam(1e-4), "0.02", note="the data of all tasks so far"),
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
            method=partial(DGR, hidden=(400, 400), generator_lr=1e-3),
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


# ---------------------------------------------------------------------- Chaudhry et al. 2019


def truncated_normal(module: nn.Module) -> None:
    """Standard deviation 0.1, cut at two of them; biases 0.1."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
        nn.init.constant_(module.bias, 0.1)


def without_validation(data: Dataset) -> tuple[Split, Split]:
    """TensorFlow's reader of MNIST sets the first 5,000 training images apart."""
    return Split(data.train.inputs[5000:], data.train.labels[5000:]), data.test


A_GEM = Protocol(
    title="Permuted MNIST, 17 tasks in one epoch each",
    source="Chaudhry et al. 2019 (arXiv:1812.00420), Table 4",
    tasks=17,
    hidden=(256, 256),
    initialize=truncated_normal,
    prepare=without_validation,
    batch_size=10,
    order=epochs(1, 10),
    keep_optimizer=False,
    tolerance="three times the published standard deviation",
    rows=(
        Row("none", 47.9, 3.9, Baseline, sgd(0.03), "1.3"),
        Row(
            "EWC",
            68.3,
            2.1,
            partial(RunningFisherEWC, strength=10.0),
            sgd(0.03),
            "0.7",
            note="released code: see bench/published/released.py",
        ),
        Row(
            "MAS",
            69.6,
            2.7,
            partial(MAS, strength=0.1, estimator="batch", gamma=0.0),
            sgd(0.1),
            "0.9",
            lambda _model, split: Batches(split, 10),
            "released code: gradients of batches of ten, the newest task's importance alone",
        ),
        Row(
            "RWalk",
            85.7,
            1.8,
            partial(RWalk, strength=1.0, variant="released"),
            sgd(0.1),
            "0.6",
            note="released code: variant='released'",
        ),
        Row(
            "EWC by its paper",
            None,
            0.0,
            partial(EWC, strength=10.0),
            sgd(0.03),
            note="Fisher per sample, added up over tasks",
        ),
        Row(
            "RWalk by its paper",
            None,
            0.0,
            partial(RWalk, strength=1.0),
            sgd(0.1),
            note="variant='paper'",
        ),
        Row(
            "RWalk by its paper, a slower average",
            None,
            0.0,
            partial(RWalk, strength=1.0, alpha=0.1),
            sgd(0.1),
            note="variant='paper', alpha=0.1",
        ),
        # 25 examples of each class in theirs, 250 of all classes together in ours.
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
    ),
)

# ---------------------------------------------------------------------- Buzzega et al. 2020


def dark_rows(budget: int, er: float, gem: float, agem: float) -> tuple[Row, ...]:
    """Of the methods with the same settings for each size of the memory."""
    wide, per_task = 2.0 if budget == 200 else 1.5, budget // 20
    # One cross entropy over the batch and what is replayed.
    replay = partial(Replay, policy="stream", balance="mean", budget=budget)
    # The released code adds 1e-3 to the diagonal of the past gradients' products.
    gem_kind = partial(GEM, per_task=per_task, margin=0.5, ridge=1e-3)
    agem_kind = partial(AGEM, per_task=per_task, batch=128)
    return (
        Row(f"ER, {budget}", er, wide, replay, sgd(0.2)),
        Row(f"GEM, {budget}", gem, 3.0, gem_kind, sgd(0.1)),
        Row(f"A-GEM, {budget}", agem, 4.0, agem_kind, sgd(0.1)),
    )


def der_row(budget: int, published: float, alpha: float, beta: float, lr: float) -> Row:
    wide = 2.0 if budget == 200 else 1.5
    if beta == 0:
        der = partial(DER, budget=budget, strength=alpha)
        return Row(f"DER, {budget}", published, wide, der, sgd(lr))
    derpp = partial(DERpp, budget=budget, strength=alpha, beta=beta)
    return Row(f"DER++, {budget}", published, wide, derpp, sgd(lr))


DARK = Protocol(
    title="DER and DER++, Permuted MNIST, 20 tasks",
    source="Buzzega et al. 2020 (arXiv:2004.07211), table 2, mean of 10 runs",
    tasks=20,
    hidden=(100, 100),
    initialize=glorot,
    prepare=unchanged,
    batch_size=128,
    order=epochs(1, 128),
    keep_optimizer=True,
    tolerance="1.5; 2 for a memory of 200; 0.5 joint; for runs that differ more 3 (GEM), 4 (A-GEM) "
    "and 5 (SGD)",
    rows=(
        Row("joint", 94.33, 0.5, Joint, sgd(0.2), trains_last_alone=True),
        Row("SGD", 40.70, 5.0, Baseline, sgd(0.2)),
        *dark_rows(200, 72.37, 66.93, 66.42),
        der_row(200, 81.74, 1.0, 0.0, 0.2),
        der_row(200, 83.58, 1.0, 1.0, 0.1),
        *dark_rows(500, 80.60, 76.88, 67.56),
        der_row(500, 87.29, 1.0, 0.0, 0.2),
        der_row(500, 88.21, 1.0, 0.5, 0.2),
        *dark_rows(5120, 89.90, 87.42, 73.32),
        der_row(5120, 91.66, 0.5, 0.0, 0.2),
        der_row(5120, 92.26, 0.5, 1.0, 0.2),
        Row("EWC", None, 0.0, partial(EWC, strength=3.0), sgd(0.1), note="ours; 10 diverges"),
        Row("L2", None, 0.0, partial(L2, strength=0.01), sgd(0.1), note="ours"),
    ),
)

# ------------------------------------------------------------------ Kronecker factors


def strengths_of(name: str, kind: Callable[..., Method], *strengths: float) -> Iterator[Row]:
    """A row for each strength, nothing published."""
    for strength in strengths:
        yield Row(f"{name}, {strength:g}", None, 0.0, partial(kind, strength=strength), adam(1e-3))


KRONECKER = Protocol(
    title="EWC with Kronecker factors, Permuted MNIST, ten tasks",
    source="our own table. Ritter et al. 2018 (arXiv:1805.07810) show over 90 after 50 tasks, "
    "Daxberger et al. 2021 (arXiv:2106.14806) about 96 after ten, by protocols of their own",
    tasks=10,
    hidden=(100, 100),
    initialize=glorot,
    prepare=unchanged,
    batch_size=128,
    order=epochs(3, 128),
    keep_optimizer=False,
    tolerance="none; strengths side by side",
    rows=(
        Row("none", None, 0.0, Baseline, adam(1e-3)),
        *strengths_of("L2", L2, 0.01, 0.03, 0.1),
        *strengths_of("EWC", EWC, 10, 30, 100),
        *strengths_of("SI", SI, 3, 10, 30),
        *strengths_of("KFAC", KFAC, 1, 3, 10),
        Row("joint", None, 0.0, Joint, adam(1e-3), trains_last_alone=True),
    ),
)

KRONECKER_50 = replace(
    KRONECKER,
    title="EWC with Kronecker factors, Permuted MNIST, 50 tasks in one epoch each",
    tasks=50,
    order=epochs(1, 128),
    rows=(*strengths_of("KFAC", KFAC, 3),),
)

# ---------------------------------------------------------------------- van de Ven 2025

FISHERS = Protocol(
    title="EWC by each kind of Fisher information, Split MNIST, a head for each task",
    source="van de Ven 2025 (arXiv:2502.11756), mean of 30 runs at the best strength of each kind",
    tasks=5,
    hidden=(400, 400),
    initialize=lambda _module: None,
    prepare=unchanged,
    batch_size=128,
    order=iterations(2000, 128),
    keep_optimizer=True,
    tolerance="0.3; 5 for none, of which runs differ much; strengths by a search on seed 100",
    scenario="split",
    shuffle_classes=True,
    rows=tuple(
        Row(name, published, tolerance, method, adam(1e-3), incremental="task")
        for name, published, tolerance, method in (
            ("none", 85.41, 5.0, Baseline),
            ("exact", 99.12, 0.3, partial(EWC, fisher="exact", strength=1e6)),
            ("sample", 99.12, 0.3, partial(EWC, fisher="sample", strength=1e7)),
            ("empirical", 99.12, 0.3, partial(EWC, fisher="empirical", strength=1e8)),
            ("batch", 99.11, 0.3, partial(EWC, fisher="batch", strength=1e12)),
        )
    ),
)

PROTOCOLS = {
    "zenke2017": ZENKE,
    "vandeven2018": VAN_DE_VEN,
    "vandeven2018-split": SPLIT,
    "agem2019": A_GEM,
    "der2020": DARK,
    "kfac": KRONECKER,
    "kfac-50": KRONECKER_50,
    "vandeven2025": FISHERS,
}
