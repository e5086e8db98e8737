"""EWC and SI by hand, in plain PyTorch."""

from time import process_time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from setting import BATCH, EPOCHS, LR, report, setting

method, strength, _, model, tasks = setting()
params = dict(model.named_parameters())
optimizer = torch.optim.Adam(model.parameters(), lr=LR)


def fisher(x, y):
    """The diagonal: the mean of each example's squared gradient."""
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for example, label in zip(x.split(1), y.split(1), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(example), label).backward()
        for name, p in params.items():
            total[name] += p.grad**2 / len(y)
    return total


start = process_time()
importance = {name: torch.zeros_like(p) for name, p in params.items()}
anchor = {name: p.detach().clone() for name, p in params.items()}
for k, (train, _) in enumerate(tasks):
    loader = DataLoader(TensorDataset(*train), BATCH, shuffle=True)
    path = {name: torch.zeros_like(p) for name, p in params.items()}
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            task_grad = {name: p.grad.clone() for name, p in params.items()}
            before = {name: p.detach().clone() for name, p in params.items()}
            if k > 0:
                for name, p in params.items():
                    p.grad += 2 * strength * importance[name] * (p.detach() - anchor[name])
            optimizer.step()
            if method == "si":
                for name, p in params.items():
                    path[name] -= task_grad[name] * (p.detach() - before[name])
    measured = fisher(*train) if method == "ewc" else {}
    for name, p in params.items():
        if method == "si":
            measured[name] = path[name].relu() / ((p.detach() - anchor[name]) ** 2 + 0.1)
        importance[name] += measured[name]
        anchor[name] = p.detach().clone()
seconds = process_time() - start

with torch.no_grad():
    found = [(model(x).argmax(1) == y).float().mean().item() for _, (x, y) in tasks]
report(seconds, found)
