"""Importance from batches and likelihoods of every kind, against a loop over single samples."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext import EWC, MAS, SCP
from clext.importance import FISHER_KINDS, fisher_information

DOUBLE = torch.float64
N = 6


class Two(nn.Module):
    """Of two inputs, one of which is looked up."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(7, outputs)

    def forward(self, tokens: Tensor, numbers: Tensor) -> Tensor:
        return self.head(torch.cat([self.table(tokens), numbers], dim=1))


@dataclass
class Logits:
    logits: Tensor
    loss: Tensor | None = None


class Language(nn.Module):
    """As a Transformers model: a mapping in, logits [N, T, C] and its own loss out."""

    def __init__(self, *, shifts: bool):
        super().__init__()
        self.table, self.head, self.shifts = nn.Embedding(5, 4), nn.Linear(4, 5), shifts

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.table(input_ids).cumsum(dim=1)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(2)
        logits, loss = self.head(hidden), None
        if labels is not None and self.shifts:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        elif labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Logits(logits, loss)


class Tokens(nn.Module):
    """Logits [N, T, C] of a plain module."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).cumsum(dim=1))


@dataclass
class Case:
    """A model, one batch, options of a method, and log p of one sample of the batch."""

    model: nn.Module
    batch: object
    log_p: object  # (model, n) -> 0-dim
    options: dict


DataBatch = namedtuple("DataBatch", "tokens numbers labels")


@dataclass
class Record:
    tokens: Tensor
    numbers: Tensor
    labels: Tensor


def ignoring(start: int) -> Tensor:
    labels = torch.randint(5, (N, 4))
    labels[:, start] = -100
    labels[-1] = -100
    return labels


def cases():
    torch.manual_seed(0)
    x, numbers = torch.randn(N, 3, dtype=DOUBLE), torch.randn(N, 3, dtype=DOUBLE)
    tokens, y = torch.randint(5, (N,)), torch.randint(3, (N,))
    ids, mask = torch.randint(5, (N, 4)), (torch.rand(N, 4) > 0.2).to(DOUBLE)
    images, pixels = torch.randn(N, 2, 4, 4, dtype=DOUBLE), torch.randint(3, (N, 4, 4))
    several = torch.randint(2, (N, 3)).to(DOUBLE)
    values = torch.randn(N, 2, dtype=DOUBLE)

    def of_two(model, n):
        return -F.cross_entropy(model(tokens[n : n + 1], numbers[n : n + 1]), y[n : n + 1])

    def language(labels, shifts):
        def log_p(model, n):
            logits = model(ids[n : n + 1], mask[n : n + 1]).logits[0]
            pair = (logits[:-1], labels[n, 1:]) if shifts else (logits, labels[n])
            return -F.cross_entropy(*pair, reduction="sum")

        return log_p

    shifted, aligned, seven = ignoring(2), ignoring(0), torch.randint(7, (N, 4))
    mapping = {"input_ids": ids, "attention_mask": mask}
    two = {"tokens": tokens, "numbers": numbers, "labels": y}
    return {
        "several inputs": Case(Two(), ((tokens, numbers), y), of_two, {}),
        "mapping": Case(Two(), two, of_two, {}),
        "dataclass": Case(Two(), Record(**two), of_two, {}),
        "more than x and y": Case(
            nn.Linear(3, 3),
            (x, y, tokens),
            lambda model, n: -F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]),
            {},
        ),
        "forward and labels": Case(
            Two(),
            DataBatch(tokens, numbers, y),
            of_two,
            {
                "forward": lambda model, batch: model(batch.tokens, batch.numbers),
                "labels": lambda batch: batch.labels,
            },
        ),
        "losses of one's own": Case(
            Two(),
            two,
            of_two,
            {
                "loss": lambda model, batch: F.cross_entropy(
                    model(batch["tokens"], batch["numbers"]), batch["labels"], reduction="none"
                )
            },
        ),
        "next tokens": Case(
            Language(shifts=True), {**mapping, "labels": shifted}, language(shifted, True), {}
        ),
        "labelled tokens": Case(
            Language(shifts=False), {**mapping, "labels": aligned}, language(aligned, False), {}
        ),
        "plain tokens": Case(
            Tokens(),
            (ids, seven),
            lambda model, n: -F.cross_entropy(model(ids[n : n + 1])[0], seven[n], reduction="sum"),
            {},
        ),
        "segmentation": Case(
            nn.Conv2d(2, 3, 3, padding=1),
            (images, pixels),
            lambda model, n: (
                -F.cross_entropy(model(images[n : n + 1]), pixels[n : n + 1], reduction="sum")
            ),
            {},
        ),
        "multi-label": Case(
            nn.Linear(3, 3),
            (x, several),
            lambda model, n: (
                -F.binary_cross_entropy_with_logits(model(x[n]), several[n], reduction="sum")
            ),
            {"likelihood": "bernoulli"},
        ),
        "binary": Case(
            nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)),
            (x, several[:, 0]),
            lambda model, n: (
                -F.binary_cross_entropy_with_logits(model(x[n : n + 1]), several[n : n + 1, 0])
            ),
            {"likelihood": "bernoulli"},
        ),
        "regression": Case(
            nn.Linear(3, 2),
            (x, values),
            lambda model, n: -(model(x[n]) - values[n]).square().sum() / 2,
            {"likelihood": "gaussian"},
        ),
    }


@pytest.fixture(params=cases())
def case(request):
    found = cases()[request.param]
    torch.manual_seed(1)
    found.model.to(DOUBLE)
    return found


def in_two(batch):
    """The batch as a loader of two."""
    from clext.core.inputs import taken

    return [taken(batch, slice(4)), taken(batch, slice(4, None))]


def squares(case):
    """The mean over samples of the squared gradient of log p, one sample after the other."""
    params = list(case.model.parameters())
    sums = [torch.zeros_like(entry) for entry in params]
    for n in range(N):
        value = case.log_p(case.model, n)
        for total, g in zip(sums, torch.autograd.grad(value, params), strict=True):
            total.add_(g.square() / N)
    return sums


def assert_equal(method, expected):
    for mine, theirs in zip(method.importance.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)


def test_the_empirical_fisher_is_that_of_single_samples(case, recwarn):
    method = EWC(case.model, **case.options)
    method.consolidate(in_two(case.batch))
    assert_equal(method, squares(case))
    assert not [str(w.message) for w in recwarn if "one sample at a time" in str(w.message)]


def test_the_loss_is_the_mean_of_log_p(case):
    method = EWC(case.model, **case.options)
    values = [-case.log_p(case.model, n) for n in range(N)]
    labels = method.heads.inputs_and_labels(case.batch)[1]
    counted = torch.tensor(N)
    if isinstance(labels, Tensor) and labels.dim() > 1:
        if case.options.get("likelihood") == "gaussian":
            counted = labels.numel() / 2
        else:
            counts = labels[:, 1:] if getattr(case.model, "shifts", False) else labels
            counted = (counts != -100).sum()
    batch = case.batch
    parts = batch if type(batch) is tuple else (batch,)
    torch.testing.assert_close(method.loss(*parts), sum(values) / counted)


def test_exact_and_sampled_fishers_take_any_outputs(case):
    """Many draws tend to the exact one."""
    if "loss" in case.options:
        for kind in ("exact", "sample", "reversed"):
            with pytest.raises(ValueError, match=f'^ewc: fisher="{kind}" takes the likelihood'):
                EWC(case.model, fisher=kind, **case.options)
        return
    exact = EWC(case.model, fisher="exact", **case.options)
    exact.consolidate([case.batch])
    total = [torch.zeros_like(entry) for entry in exact.importance.values()]
    params, count = list(case.model.parameters()), 300
    for seed in range(count):
        found = fisher_information(
            case.model, params, [case.batch], kind="sample", seed=seed, supervision=exact.heads
        )
        torch._foreach_add_(total, found, alpha=1 / count)
    for mine, theirs in zip(exact.importance.values(), total, strict=True):
        assert mine.sum() > 0
        torch.testing.assert_close(mine.sum(), theirs.sum(), rtol=0.15, atol=0)


def test_mas_and_scp_take_any_outputs(case):
    """Whatever loss= is: the outputs are the model's."""
    if "loss" in case.options:
        return
    mas, scp = MAS(case.model, **case.options), SCP(case.model, **case.options)
    for method in (mas, scp):
        method.consolidate(in_two(case.batch))
    params = list(case.model.parameters())
    inputs = mas.heads.inputs_and_labels(case.batch)[0]
    outputs = mas.heads(inputs).reshape(N, -1)
    sums = [torch.zeros_like(entry) for entry in params]
    for n in range(N):
        gradients = torch.autograd.grad(outputs[n].square().sum(), params, retain_graph=True)
        for total, g in zip(sums, gradients, strict=True):
            total.add_(g.abs() / N)
    assert_equal(mas, sums)
    mean = outputs.mean(0)
    sums = [torch.zeros_like(entry) for entry in params]
    for output in mean:
        gradients = torch.autograd.grad(output, params, retain_graph=True)
        for total, g in zip(sums, gradients, strict=True):
            total.add_(g.square() / len(mean))
    assert_equal(scp, sums)


@pytest.mark.parametrize("kind", FISHER_KINDS)
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 99, 1]), torch.randn(3, 3), torch.zeros(3).bool(), torch.zeros(3, 1).long()],
)
def test_every_kind_of_fisher_refuses_the_same_labels(kind, labels):
    model = nn.Linear(3, 3)
    method = EWC(model, fisher=kind)
    with pytest.raises(ValueError, match="labels"):
        method.consolidate([(torch.randn(3, 3), labels)])
    assert method.tasks == 0
    assert all(not entry.any() for entry in method.importance.values())


def test_one_output_has_the_bernoulli_likelihood_or_none():
    x = torch.randn(8, 4, dtype=DOUBLE)
    y = torch.randint(2, (8,))
    model = nn.Linear(4, 1).double()
    for kind in FISHER_KINDS:
        with pytest.raises(ValueError, match='the model has one output, .*likelihood="bernoulli"'):
            EWC(model, fisher=kind).consolidate([(x, torch.zeros(8).long())])
    method = EWC(model, fisher="exact", likelihood="bernoulli")
    method.consolidate([(x, y)])
    p = model(x).sigmoid()
    expected = (p * (1 - p) * x.square()).mean(0, keepdim=True)
    torch.testing.assert_close(method.importance["weight"], expected.detach())


def test_a_loss_that_is_one_number_serves_for_the_batch_fisher_alone():
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    model = nn.Linear(3, 3)

    def mean(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    own, plain = EWC(model, fisher="batch", loss=mean), EWC(model, fisher="batch")
    for method in (own, plain):
        method.consolidate([(x, y)])
    torch.testing.assert_close(own.importance["weight"], plain.importance["weight"])
    with pytest.raises(ValueError, match='for 6 samples, .* enough for fisher="batch"'):
        EWC(model, loss=mean).consolidate([(x, y)])


def test_samples_bound_what_is_measured():
    x, y = torch.randn(10, 3), torch.randint(3, (10,))
    model = nn.Linear(3, 3)
    read = []

    def loader():
        for start in range(0, 10, 4):
            read.append(start)
            yield x[start : start + 4], y[start : start + 4]

    for method in (EWC, MAS, SCP):
        read.clear()
        bounded, whole = method(model, samples=6), method(model)
        bounded.consolidate(loader())
        assert read == [0, 4]
        whole.consolidate([(x[:6], y[:6])])
        torch.testing.assert_close(bounded.importance["weight"], whole.importance["weight"])
    with pytest.raises(ValueError, match="samples must be an integer >= 1, got 0"):
        EWC(model, samples=0)


def test_a_loss_of_the_models_own_that_is_another_is_refused():
    model = Language(shifts=True).double()
    smoothed = model.forward

    def forward(input_ids, labels=None):
        out = smoothed(input_ids, labels=labels)
        return Logits(out.logits, None if out.loss is None else out.loss * 1.5)

    model.forward = forward
    ids = torch.randint(5, (N, 4))
    with pytest.raises(ValueError, match="the model's own loss .* is not that of its logits"):
        EWC(model).consolidate([{"input_ids": ids, "labels": ids}])
    said = EWC(model, labels=lambda batch: F.pad(batch["labels"][:, 1:], (0, 1), value=-100))
    said.consolidate([{"input_ids": ids, "labels": ids}])
    assert said.importance["head.weight"].any()


@pytest.mark.parametrize("shifts", [True, False])
def test_a_model_that_has_learned_nothing_says_which_labels_it_takes(shifts):
    """Both ways have nearly the same loss, log of the number of classes."""
    model = Language(shifts=shifts)
    with torch.no_grad():
        model.head.weight.mul_(1e-3)
        model.head.bias.zero_()
    ids = torch.randint(5, (N, 4))
    method = EWC(model)
    for batch in ({"input_ids": ids, "labels": ids}, ({"input_ids": ids}, ids), (ids, ids)):
        parts = batch if type(batch) is tuple else (batch,)
        torch.testing.assert_close(method.loss(*parts), model(ids, labels=ids).loss)


def test_as_many_positions_as_classes_are_told_by_another_batch():
    model = Tokens()
    method = EWC(model)
    alike = torch.randint(5, (N, 7)), torch.randint(7, (N, 7))
    with pytest.raises(ValueError, match="begin with a batch of another length"):
        method.loss(*alike)
    method.loss(torch.randint(5, (N, 4)), torch.randint(7, (N, 4)))
    expected = F.cross_entropy(model(alike[0]).flatten(0, 1), alike[1].flatten())
    torch.testing.assert_close(method.loss(*alike), expected)


def test_numbers_for_positions_are_not_turned():
    model = Language(shifts=False)
    ids = torch.randint(5, (N, 5))  # as many positions as outputs
    values = torch.randn(N, 5, 5)
    method = EWC(model, likelihood="gaussian")
    batch = {"input_ids": ids, "labels": values}
    torch.testing.assert_close(method.loss(batch), F.mse_loss(model(ids).logits, values))


class Anything(nn.Module):
    """A wrapper as DDP, whose forward hides what the model takes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_models_are_given_what_they_name():
    inner = Two()
    batch = {
        "tokens": torch.randint(5, (N,)),
        "numbers": torch.randn(N, 3),
        "labels": torch.randint(3, (N,)),
        "index": torch.arange(N),
    }
    expected = EWC(inner).loss(batch)
    for model in (Anything(inner), torch.compile(inner, backend="eager")):
        assert torch.equal(EWC(model).loss(batch), expected)


def test_outputs_are_the_models_where_a_loss_is_given():
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    model = nn.Linear(3, 3)
    for kind in (MAS, SCP):
        one, other = kind(model), kind(model, loss=lambda *_: pytest.fail("not asked"))
        for method in (one, other):
            method.consolidate([(x, y)])
        assert torch.equal(one.importance["weight"], other.importance["weight"])


def test_labels_of_which_none_counts_are_refused():
    model = nn.Linear(3, 3)
    method = EWC(model)
    x, y = torch.randn(N, 3), torch.full((N,), -100)
    with pytest.raises(ValueError, match="all labels of the data are -100, so that none counts"):
        method.consolidate([(x, y)])
    assert method.tasks == 0
    method.consolidate([(x, y), (x, torch.zeros(N).long())])


def test_a_data_set_is_not_taken_for_a_loader():
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    data = torch.utils.data.TensorDataset(x, y)
    with pytest.raises(
        ValueError, match="a TensorDataset gives single samples; pass a .*DataLoader"
    ):
        EWC(nn.Linear(3, 3)).consolidate(data)
    EWC(nn.Linear(3, 3)).consolidate(torch.utils.data.DataLoader(data))


def test_an_option_that_there_is_not_is_named_with_those_there_are():
    with pytest.raises(
        TypeError,
        match="EWC has no option 'lam'; its options are strength, fisher, .*mean 'strength'",
    ):
        EWC(nn.Linear(3, 3), lam=3.0)


def test_keywords_that_a_model_passes_on_are_given_to_it():
    class Passing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.lm = inner

        def forward(self, input_ids, **more):
            return self.lm(input_ids, **more)

    model = Passing(Language(shifts=True))
    ids, mask = torch.randint(5, (N, 4)), (torch.rand(N, 4) > 0.5).float()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    torch.testing.assert_close(EWC(model).loss(batch), model.lm(**batch).loss)
