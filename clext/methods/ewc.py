"""Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clext.core.checks import count_or_all, integer, number
from clext.core.sharding import whole
from clext.importance import FISHER_KINDS, fisher_information, second_moment
from clext.importance.fisher import check_kind
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.supervision import SupervisionOptions


class EWC(QuadraticPenalty):
    """Importance F: the diagonal of the Fisher information at the end of a task.

        F_i = mean over samples of (d log p(label | inputs) / d parameter_i)^2

    After task k with parameters theta_k, importance = gamma * importance + F_k, and the anchor is

    - anchors="latest": theta_k (online EWC for gamma < 1);
    - anchors="all": the minimum of sum_k gamma^(K-k) F_k (theta - theta_k)^2 over all K tasks so
      far, which the penalty then equals exactly: a sum of quadratics is one quadratic and a
      constant, so that memory and time do not grow with the tasks.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        fisher: how the Fisher information is taken: "empirical", "exact", "sample", "reversed" or
            "batch"; see `clext.importance.fisher_information`. Or from Adam's second moment,
            without a pass over data: "optimizer", which `consolidate(optimizer)` is given in their
            place; see `clext.importance.second_moment`, also for its size, by which strength is to
            be larger, and for the pull of earlier tasks, which is in it unless the optimizer is
            proximal. "reversed" is several times larger (six to fifteen on digits), and strength to
            be smaller by that.
            With Kronecker factors in the diagonal's place EWC is `clext.KFAC`.
        gamma: what is left of the old importance after each task, in [0, 1].
        anchors: where it pulls to: the values after the "latest" task, or those after "all".
        weighting: of the tasks: F_k is the "mean" of the squared gradients over the N_k samples
            that are measured, or their "sum", N_k times as much. By Bayes' rule a new task's mean
            loss over N samples goes with 1 / (2 N) * sum_k N_k F_k (theta - theta_k)^2, F_k a mean:
            with "sum" strength is 1 / (2 N), whatever the sizes of old tasks and of batches.
        samples: how many samples F_k is measured on, the first that the loader gives: shuffle it.
            None: all.
        seed: of the labels drawn by fisher="sample"; the k-th task (from 0) uses seed + k.
        state_dtype: of anchor and importance; see `QuadraticPenalty`.
    """

    name: ClassVar[str] = "ewc"
    default_strength: ClassVar[float] = 250.0
    counter_names: tuple[str, ...] = ("tasks", "steps", "constant")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "fisher": (*FISHER_KINDS, "optimizer"),
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
        samples: int | None = None,
        seed: int = 0,
        state_dtype: torch.dtype | str | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, state_dtype=state_dtype, **supervision)
        self.fisher = self._choice("fisher", fisher)
        self.gamma = number(self.name, "gamma", gamma, minimum=0.0, maximum=1.0)
        self.anchors = self._choice("anchors", anchors)
        self.weighting = self._choice("weighting", weighting)
        self.samples = count_or_all(self.name, "samples", samples)
        check_kind(self.name, self.fisher, self.heads)
        self.seed = integer(self.name, "seed", seed, minimum=0)
        self.takes_optimizer = self.fisher == "optimizer"
        if self.takes_optimizer and self.weighting == "sum":
            raise ValueError(
                f'{self.name}: weighting="sum" counts samples, of which fisher="optimizer" sees '
                'none; use weighting="mean"'
            )
        self.constant = 0.0  # what a sum of quadratics is more than one; 0 for anchors="latest"

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if self.anchors != "all" and self.constant != 0:
            raise ValueError('it is of an EWC with anchors="all"; make this one so')

    def _end_task(self, dataloader: Batches | None) -> None:
        fisher = self._measured(dataloader)
        if self.anchors == "all":
            added = self._state.plan.consolidate_all_anchors_(fisher, self.gamma)
            self.constant = self.gamma * self.constant + float(whole(added))
        else:
            self._state.plan.consolidate_importance_(fisher, self.gamma)

    def _measured(self, dataloader: Batches | None) -> list[Tensor]:
        """F of the task that has ended."""
        if self.takes_optimizer:
            return second_moment(self._state.params, dataloader)
        return fisher_information(
            self.model,
            self._state.params,
            dataloader,
            kind=self.fisher,
            seed=self.seed + self.tasks,
            supervision=self.heads,
            samples=self.samples,
            reduction=self.weighting,
        )
