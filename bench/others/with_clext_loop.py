"""clext's classes in a loop of one's own."""

from time import process_time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import clext
from setting import BATCH, EPOCHS, LR, report, setting

name, strength, _, model, tasks = setting()
method = {"ewc": clext.EWC, "si": clext.SI}[name](model, strength=strength)
optimizer = clext.optim.Adam(model.parameters(), lr=LR, method=method)

start = process_time()
for train, _ in tasks:
    loader = DataLoader(TensorDataset(*train), BATCH, shuffle=True)
    for _ in range(EPOCHS):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    method.consolidate(loader)
seconds = process_time() - start

with torch.no_grad():
    found = [(model(x).argmax(1) == y).float().mean().item() for _, (x, y) in tasks]
report(seconds, found)
