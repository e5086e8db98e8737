"""EWC with Kronecker factors (Ritter et al. 2018, arXiv:1805.07810)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar, cast

from clext.core.checks import count_or_all, integer
from clext.importance import KRONECKER_KINDS, kronecker_factors
from clext.importance.fisher import check_kind
from clext.methods.parts.factored_state import FactoredState
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from typing import Unpack

    from torch import nn

    from clext.core.batches import Batches
    from clext.core.supervision import SupervisionOptions
    from clext.importance import LayerFactors
    from clext.methods.parts.state import ParameterState


class KFAC(QuadraticPenalty):
    """Parameters of a layer are pulled together: online Laplace with Kronecker factors.

    With D = [b - b*, W - W*], [out, 1 + in], the change of a layer since the last task, and the
    factors G_k [out, out] and A_k [1 + in, 1 + in] of the k-th task's Fisher information, it adds

        strength * sum_k sum of D * (G_k D A_k)

    to the penalty: the quadratic form of sum_k G_k (x) A_k, whose diagonal is about EWC's
    importance. The factors of every task are kept, so memory and the time of a step grow with the
    tasks: a pull takes two matrix products a layer, with the factors of all tasks side by side. By
    Bayes' rule strength is 1/2 where all tasks have as many samples; the default did best of 1, 3
    and 10 in one run each on Permuted MNIST. The form's largest eigenvalues are far above the
    diagonal: take Adam, or a small rate with plain SGD.

    Which layers have factors: see `clext.importance.kronecker_factors`. For all other parameters
    importance is the diagonal, as in EWC.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        fisher: how the Fisher information is taken: "sample", "exact", "empirical" or "reversed";
            see `clext.importance.fisher_information`.
        samples: how many samples it is measured on, the first that the loader gives; None: all.
        seed: of the labels drawn by fisher="sample"; the k-th task (from 0) uses seed + k.
    """

    name: ClassVar[str] = "kfac"
    default_strength: ClassVar[float] = 3.0
    needs_whole: ClassVar[bool] = True
    fused: tuple[str, ...] | None = None
    state_kind: ClassVar[type[ParameterState]] = FactoredState
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"fisher": KRONECKER_KINDS}

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        fisher: str = "sample",
        samples: int | None = None,
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, **supervision)
        self.fisher = self._choice("fisher", fisher)
        self.samples = count_or_all(self.name, "samples", samples)
        check_kind(self.name, self.fisher, self.heads)
        self.seed = integer(self.name, "seed", seed, minimum=0)

    @property
    def factors(self) -> dict[str, LayerFactors]:
        """By the name of the weight: the factors themselves, a row [tasks, ...] for each task."""
        return dict(self._own.factors)

    @property
    def _own(self) -> FactoredState:
        return cast("FactoredState", self._state)

    def _end_task(self, dataloader: Batches | None) -> None:
        factors, diagonal = kronecker_factors(
            self.model,
            self._state.params,
            dataloader,
            kind=self.fisher,
            seed=self.seed + self.tasks,
            supervision=self.heads,
            samples=self.samples,
        )
        names = self._state.names
        if self.tasks == 0:
            self._name_others({names[i] for i in factors})
        self._state.plan.consolidate_importance_(diagonal, 1.0)
        self._own.add_factors({names[i]: pair for i, pair in factors.items()})

    def _name_others(self, factored: set[str]) -> None:
        """A warning that names weights without factors: norms and biases never have some."""
        others = [
            name
            for name, entry in zip(self._state.names, self._state.params, strict=True)
            if entry.dim() > 1 and entry.requires_grad and name not in factored
        ]
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            warnings.warn(
                f"clext: {self.name} has no Kronecker factors for '{others[0]}'{more}, which no "
                "linear layer or convolution alone uses; of these it keeps the diagonal, as EWC",
                stacklevel=4,
            )
