"""Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from clext.core.checks import integer, number
from clext.importance import FISHER_KINDS, fisher_information
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from clext.core.batches import Batches


class EWC(QuadraticPenalty):
    """Importance F: the diagonal of the Fisher information at the end of a task.

    After task k with parameters theta_k, importance = gamma * importance + F_k, and the anchor is

    - anchors="latest": theta_k (online EWC for gamma < 1);
    - anchors="all": the minimum of sum_k gamma^(K-k) F_k (theta - theta_k)^2 over all K tasks so
      far, which the penalty then equals exactly: a sum of quadratics is one quadratic and a
      constant, so that memory and time do not grow with the tasks.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        fisher: how the Fisher information is taken: "empirical", "exact", "sample" or "batch"; see
            `clext.importance.fisher_information`.
        gamma: what is left of the old importance after each task, in [0, 1].
        anchors: where it pulls to: the values after the "latest" task, or those after "all".
        weighting: of the tasks: F_k is the "mean" of the squared gradients over the N_k samples of
            the task, or their "sum", N_k times as much. By Bayes' rule a new task's mean loss over
            N samples goes with 1 / (2 N) * sum_k N_k F_k (theta - theta_k)^2, F_k a mean: with
            "sum" strength is 1 / (2 N), whatever the sizes of the old tasks and of the batches.
        seed: of the labels drawn by fisher="sample"; the k-th task (from 0) uses seed + k.
        state_dtype: of anchor and importance; see `QuadraticPenalty`.
    """

    name: ClassVar[str] = "ewc"
    default_strength: ClassVar[float] = 250.0
    counter_names: tuple[str, ...] = ("tasks", "steps", "constant")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "fisher": FISHER_KINDS,
        "anchors": ("latest", "all"),
        "weighting": ("mean", "sum"),
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        fisher: str = "empirical",
        gamma: float = 1.0,
        anchors: str = "latest",
        weighting: str = "mean",
        seed: int = 0,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(model, strength=strength, state_dtype=state_dtype)
        self.fisher = self._choice("fisher", fisher)
        self.gamma = number(self.name, "gamma", gamma, minimum=0.0, maximum=1.0)
        self.anchors = self._choice("anchors", anchors)
        self.weighting = self._choice("weighting", weighting)
        self.seed = integer(self.name, "seed", seed, minimum=0)
        self.constant = 0.0  # what a sum of quadratics is more than one; 0 for anchors="latest"

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if self.anchors != "all" and self.constant != 0:
            raise ValueError('it is of an EWC with anchors="all"; make this one so')

    def _end_task(self, dataloader: Batches | None) -> None:
        samples: list[int] = []
        if self.weighting == "sum" and _is_iterable(dataloader):
            dataloader = _counted(dataloader, samples)
        fisher = fisher_information(
            self.model,
            self._state.params,
            dataloader,
            kind=self.fisher,
            seed=self.seed + self.tasks,
            forward=self.heads,
        )
        if self.weighting == "sum":
            torch._foreach_mul_(fisher, float(sum(samples)))
        if self.anchors == "all":
            added = self._state.plan.consolidate_all_anchors_(fisher, self.gamma)
            self.constant = self.gamma * self.constant + float(added)
        else:
            self._state.plan.consolidate_importance_(fisher, self.gamma)


def _is_iterable(batches: Batches | None) -> TypeGuard[Batches]:
    """Else the estimator has its own words for it."""
    return hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")


def _counted(batches: Batches, samples: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; once one was taken without complaint, its number of samples joins `samples`."""
    for batch in batches:
        yield batch
        samples.append(len(batch[0]))
