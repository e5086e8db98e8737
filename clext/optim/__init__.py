"""Optimizers whose one pass over the parameters also does a method's work.

Drop-in for their namesakes in `torch.optim`; with `method=` the step adds the pull to the anchor
and follows the path integral in the pass that updates the parameters::

    reg = clext.SI(model)
    optimizer = clext.optim.Adam(model.parameters(), lr=1e-3, method=reg)
    for task in tasks:
        for x, y in task:
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        reg.consolidate(task)
"""

from clext.optim.adam import Adam, AdamW
from clext.optim.base import FusedOptimizer
from clext.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer"]
