"""The course's protocol as a notebook writes it: torchvision, a DataLoader, autograd penalties.

What `clext.train` is compared with: as many tasks of as many images, the same model, batch size,
learning rate and times at which accuracy is taken, and the same order of the methods' work. The
accuracies do not compare, since images are normalised here, permutations are drawn otherwise, and
formulas and strengths are the course's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from clext.training.models import mlp

BATCH, LR, XI = 128, 1e-4, 0.1
Loaders = tuple[DataLoader[tuple[Tensor, Tensor]], DataLoader[tuple[Tensor, Tensor]]]


def permuted_mnist(root: Path, tasks: int) -> list[Loaders]:
    """A training and a test loader for each task; torchvision is needed here alone."""
    from torchvision import datasets, transforms

    loaders = []
    for _ in range(tasks):
        permutation = torch.randperm(784)
        transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.1307,), (0.3081,)),
                transforms.Lambda(lambda x, order=permutation: x.view(-1)[order]),
            ]
        )
        train, test = (datasets.MNIST(root, train=t, transform=transform) for t in (True, False))
        loaders.append((DataLoader(train, BATCH, shuffle=True), DataLoader(test, BATCH)))
    return loaders


class Baseline:
    strength = 0.0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.importance = {n: torch.zeros_like(p) for n, p in self.params.items()}
        self.anchor = {n: p.detach().clone() for n, p in self.params.items()}

    def penalty(self) -> Tensor:
        loss = torch.zeros((), device=next(iter(self.params.values())).device)
        for n, p in self.params.items():
            loss = loss + (self.importance[n] * (p - self.anchor[n]) ** 2).sum()
        return self.strength * loss

    def update(self) -> None:
        """After each step."""

    def consolidate(self, loader: DataLoader[tuple[Tensor, Tensor]], device: str) -> None:
        """At the end of a task."""


class EWC(Baseline):
    """Squares of each batch's gradient, averaged over the batches."""

    strength = 100.0

    def consolidate(self, loader: DataLoader[tuple[Tensor, Tensor]], device: str) -> None:
        self.model.eval()
        for x, y in loader:
            self.model.zero_grad()
            functional.cross_entropy(self.model(x.to(device)), y.to(device)).backward()
            for n, p in self.params.items():
                self.importance[n] += p.grad**2 / len(loader)
        self.model.zero_grad()
        self.anchor = {n: p.detach().clone() for n, p in self.params.items()}
        self.model.train()


class SI(Baseline):
    """The path integral, the penalty's gradient in it."""

    strength = 1.0

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.path = {n: torch.zeros_like(p) for n, p in self.params.items()}
        self.p_old = {n: p.detach().clone() for n, p in self.params.items()}

    def update(self) -> None:
        for n, p in self.params.items():
            self.path[n] -= p.grad * (p.detach() - self.p_old[n])
            self.p_old[n] = p.detach().clone()

    def consolidate(self, loader: object, device: str) -> None:  # noqa: ARG002
        for n, p in self.params.items():
            change = p.detach() - self.anchor[n]
            self.importance[n] += self.path[n].clamp(min=0) / (change**2 + XI)
            self.path[n].zero_()
            self.anchor[n] = p.detach().clone()


COURSE_METHODS: dict[str, Callable[[nn.Module], Baseline]] = {
    "baseline": Baseline,
    "ewc": EWC,
    "si": SI,
}


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], device: str) -> float:
    model.eval()
    correct = total = 0
    for x, y in loader:
        predicted = model(x.to(device)).argmax(dim=1).cpu()
        correct += (predicted == y).sum().item()
        total += len(y)
    model.train()
    return correct / total


def course_protocol(
    method: str, root: Path, tasks: int, epochs: int, device: str
) -> tuple[float, list[float]]:
    """Seconds, and the accuracies on all tasks after the last one."""
    torch.manual_seed(0)
    loaders = permuted_mnist(root, tasks)
    model = mlp().to(device)
    learner = COURSE_METHODS[method](model)
    final: list[float] = []
    start = time.perf_counter()
    for k, (train, _) in enumerate(loaders):
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        for _ in range(epochs):
            for x, y in train:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x.to(device)), y.to(device))
                if k > 0:
                    loss = loss + learner.penalty()
                loss.backward()
                optimizer.step()
                learner.update()
            final = [accuracy(model, test, device) for _, test in loaders[: k + 1]]
        learner.consolidate(train, device)
    return time.perf_counter() - start, final
