"""The classes of the course's notebook, as the tests write them (tests/support), in its loop."""

import sys
from pathlib import Path
from time import process_time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from setting import BATCH, EPOCHS, LR, report, setting

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
from notebook_methods import EWC, SI

method, strength, _, model, tasks = setting()
optimizer = torch.optim.Adam(model.parameters(), lr=LR)
start = process_time()
guards = []
guard = EWC(model, None, "cpu") if method == "ewc" else SI(model, None, 0.1, "cpu")
for train, _ in tasks:
    loader = DataLoader(TensorDataset(*train), BATCH, shuffle=True)
    model.train()
    for _ in range(EPOCHS):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y) + strength * guard.penalty(model)
            guard.update(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if method == "ewc":
        guards.append(guard._precision_matrices)
        guard = EWC(model, loader, "cpu", guards)
    else:
        guard = SI(model, loader, 0.1, "cpu")
    model.zero_grad()
seconds = process_time() - start

with torch.no_grad():
    found = [(model(x).argmax(1) == y).float().mean().item() for _, (x, y) in tasks]
report(seconds, found)
