"""The six classes of the course's notebook: the same constructors, loop and numbers, fused.

A notebook that defines `baseline`, `ewc`, `mas`, `si`, `rwalk` and `scp` itself can delete those
cells and import them from here; nothing else changes::

    guard = ewc(model=model, dataloader=None, device=device)
    prev_guards = []
    for dataloader in tasks:
        for x, y in dataloader:                     # of every epoch
            loss = cross_entropy(model(x), y)
            loss += strength * guard.penalty(model)
            guard.update(model)                     # before zero_grad: the step before this one
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        prev_guards.append(guard._precision_matrices)
        guard = ewc(model=model, dataloader=dataloader, device=device, prev_guards=prev_guards)

The numbers are those of the notebook up to rounding, also where it departs from the papers, which
`clext.EWC` and its like follow. Its departures, by the names that the classes use:

- *batch mean*: an importance is the square (MAS: the absolute value) of the gradient of a batch's
  mean, averaged over batches, not over samples; gradients of different samples cancel in it, so it
  falls with the batch size. A last, smaller batch counts as much as the others.
- *guards again*: an entry of `prev_guards` holds all tasks before it already, and all entries are
  summed: after tasks 1, 2, 3, 4 that is F1, F1 + F2, 2 F1 + F2 + F3, 4 F1 + 2 F2 + F3 + F4.
- *penalty in the path*: the gradient that is multiplied with the step is that of the whole loss.
- *negative path*: a path integral below zero stays, and makes its penalty a reward. (SI's paper has
  no max(0, .) either; its authors' released code and `clext.SI` have.)
- *last step*: `update` sees a step when the next one begins; nobody sees the last one of a task.
- *left behind*: after a look at the data (also at none) the model stays in eval mode, and `.grad`
  holds the gradient of the last batch.
- *buffers on the model*: SI and RWalk hand their state to the next object through buffers of the
  model (parameter name with `__` for dots, then `_SI_prev_task`, `_W`, `_SI_omega`). They are in
  its `state_dict()`, and a second sequence of tasks on the same model begins with those of the
  first.

Attributes and methods are the notebook's: what a hand writes to `_precision_matrices`, `_n_omega`,
`p_old` and the like, or a subclass returns from `_calculate_importance` (`mas`, `scp`:
`calculate_importance`; `rwalk`: `_calculate_importance_ewc` as well) or `_init_`, takes effect.

Unlike in the notebook, frozen parameters are left out, state of half-precision parameters is
float32, and arguments that do not fit raise one sentence and leave the model as it was.
"""

from clext.course.base import baseline
from clext.course.measured import ewc, mas, scp
from clext.course.path import rwalk, si

__all__ = ["baseline", "ewc", "mas", "rwalk", "scp", "si"]
