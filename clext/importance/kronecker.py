"""Kronecker factors of the Fisher information, layer by layer.

Martens and Grosse 2015 (arXiv:1503.05671), for convolutions Grosse and Martens 2016
(arXiv:1602.01407).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.checks import choice, integer
from clext.core.lists import widest
from clext.core.parameters import allocate_state
from clext.core.supervision import Supervision
from clext.importance.capture import Capture, output_gradients
from clext.importance.coverage import CoverageFinder
from clext.importance.fisher import add_data, check_kind, forward_of
from clext.importance.passes import averaged, check_finite, evaluation, flat, parameter_list
from clext.importance.per_sample import PerSampleSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.importance.call import Call
    from clext.importance.passes import Forward
    from clext.importance.per_sample import Cotangents

KRONECKER_KINDS = ("sample", "exact", "empirical", "reversed")


class LayerFactors(NamedTuple):
    """F of a layer with weight W [out, in] (a kernel flattened) and bias b: outputs (x) inputs.

    For changes D = [db, dW], [out, 1 + in], of the two the quadratic form of F is the sum of
    D * (outputs @ D @ inputs). Both factors are symmetric. `inputs` has zeros in its first row and
    column where the bias has no part in it.
    """

    inputs: Tensor  # [1 + in, 1 + in]
    outputs: Tensor  # [out, out]


def kronecker_factors(
    model: nn.Module,
    params: Sequence[Tensor],
    batches: Batches | None,
    *,
    kind: str = "sample",
    seed: int = 0,
    supervision: Supervision | None = None,
    samples: int | None = None,
) -> tuple[dict[int, LayerFactors], list[Tensor]]:
    """The Fisher information of linear layers and convolutions as one Kronecker product each.

    With a_t the input (1 first, for the bias) and g_t the gradient of log p(y | x) by the output of
    one sample in row t (a position of a sequence, a window of a convolution, a call of a layer that
    is called again), the factors are the mean over samples of sum_t a_t a_t^T and the mean over all
    rows of g_t g_t^T. That takes inputs and gradients for independent of each other.

    Layers whose parameters are used elsewhere too, convolutions in groups, norms, embeddings and
    parameters without a layer have none: of these the diagonal is returned, as by
    `fisher_information`. Which have some is seen in the first batch.

    Args:
        model: left as it was.
        params: parameters of `model`; frozen ones have no part.
        batches: as for `fisher_information`, as all below.
        kind: of the Fisher information, any but "batch".
        seed: of the draws for "sample".
        supervision: what of a batch goes into the model, and how labels follow from its outputs.
        samples: how many are measured; None: all.

    Returns:
        Of each layer, by the index of its weight in `params`, the factors; and one tensor per
        parameter: the diagonal where there are no factors, else zeros.

    Raises:
        ValueError: the data or the outputs are not as described, or not finite.
    """
    choice("kronecker_factors", "kind", kind, KRONECKER_KINDS)
    seed = integer("kronecker_factors", "seed", seed, minimum=0)
    supervision = Supervision(model) if supervision is None else supervision
    check_kind("kronecker_factors", kind, supervision)
    owner = f"Kronecker factors ({kind})"
    params = parameter_list(owner, model, params)
    processes = supervision.processes  # which the model does not show inside
    with evaluation(model, params, seed) as held:
        sums = KroneckerSum(owner, model, held, forward_of(supervision, kind))
        data = supervision.read(
            owner, batches, held[0].device, samples=samples, processes=processes
        )
        count = add_data(sums, owner, kind, supervision, data, seed, processes)
        found = [places for places in processes.gathered(sums.places) if places is not None]
        if any(places != found[0] for places in found):
            raise ValueError(
                f"{owner}: the processes' batches do not go through the same layers; begin with "
                "batches that do"
            )
        sums.begin(found[0])
        diagonal = sums.diagonal
        processes.sum_(diagonal)
        rows = [sum(each) for each in zip(*processes.gathered(sums.rows), strict=True)]
        factors = {}
        for rows_of_layer, (i, layer) in zip(rows, sums.layers.items(), strict=True):
            pair = LayerFactors(layer.inputs, layer.outputs)
            processes.sum_(pair)
            pair.inputs.div_(count)
            pair.outputs.div_(max(1, rows_of_layer))
            if not all(bool(entry.isfinite().all()) for entry in pair):
                raise ValueError(
                    f"{owner}: a factor is not finite (NaN or infinity): the gradients of the "
                    "model overflow on this data"
                )
            factors[i] = pair
        return factors, averaged(owner, diagonal, count, params)


class _Layer:
    """Of one layer: sums of products of its inputs, and of the gradients by its outputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.has_bias, self.rows = bias is not None, 0
        out, width = len(weight), weight[0].numel()
        new = weight.new_zeros((), dtype=widest([weight] if bias is None else [weight, bias]))
        self.products, self.totals = new.new_zeros(width, width), new.new_zeros(width)
        self.outputs = new.new_zeros(out, out)

    @property
    def inputs(self) -> Tensor:
        """With the bias's ones in front; apart from these sums are faster: rows begin aligned."""
        both = F.pad(self.products, (1, 0, 1, 0))
        if self.has_bias:
            both[0, 0] = self.rows
            both[0, 1:] = both[1:, 0] = self.totals
        return both

    def add_inputs(self, call: Call) -> None:
        for columns in call.input_columns():
            self.products.addmm_(columns, columns.T)
            self.totals += columns.sum(1)
            self.rows += columns.shape[1]

    def add_outputs(self, call: Call, g: Tensor) -> None:
        columns = call.output_columns(g)
        self.outputs.addmm_(columns, columns.T)


class KroneckerSum:
    """Like PerSampleSum, but for layers that multiply: sums for the two factors of each.

    `layers` has them by the index of the weight; `places`: the same index -> that of the bias. What
    is no such layer's is in `diagonal`.
    """

    def __init__(
        self, owner: str, model: nn.Module, params: Sequence[Tensor], forward: Forward
    ) -> None:
        self._owner, self._model, self._params, self._forward = owner, model, params, forward
        self._capture = Capture(model, params, forward, lambda rule: rule.multiplies)
        self.places: dict[int, int | None] | None = None  # None: nothing is known yet
        self.layers: dict[int, _Layer] = {}
        self._rest: list[int] = []
        self._sums: PerSampleSum | None = None

    @property
    def rows(self) -> list[int]:
        """How many rows each layer has had so far."""
        return [layer.rows for layer in self.layers.values()]

    @property
    def diagonal(self) -> list[Tensor]:
        """What was added so far of parameters without factors, 0 for all others."""
        found = allocate_state(self._params)
        for i, entry in zip(self._rest, self._sums.sums if self._sums else (), strict=True):
            found[i] = entry
        return found

    def begin(self, places: dict[int, int | None]) -> None:
        """These layers have factors; the first call counts."""
        if self.places is not None:
            return
        params, self.places = self._params, places
        for i, bias in places.items():
            self.layers[i] = _Layer(params[i], None if bias is None else params[bias])
        known = {*places, *places.values()}
        rest = [i for i, entry in enumerate(params) if entry.requires_grad and i not in known]
        if rest:
            self._rest, chosen = rest, [params[i] for i in rest]
            self._sums = PerSampleSum(
                self._owner, self._model, chosen, self._forward, absolute=False
            )

    def add(self, x: Inputs, cotangents: Cotangents) -> None:
        """Add the samples of one batch."""
        outputs, calls = self._capture.forward(x)
        weights = cotangents(check_finite(self._owner, outputs).detach())
        outputs = flat(outputs)
        if self.places is None:
            self.begin(self._places(x, outputs, calls))
        calls = [call for call in calls if call.places.get("weight") in self.layers]
        layers = [self.layers[call.places["weight"]] for call in calls]
        for layer, call in zip(layers, calls, strict=True):
            layer.add_inputs(call)
        for weight in weights:
            found, _ = output_gradients(outputs, calls, flat(weight))
            for layer, call, g in zip(layers, calls, found, strict=True):
                if g is not None:
                    layer.add_outputs(call, g)
        if self._sums is not None:
            self._sums.add(x, cotangents)

    def _places(self, x: Inputs, outputs: Tensor, calls: Sequence[Call]) -> dict[int, int | None]:
        """The layers of which autograd says that all uses of their parameters are among `calls`."""
        finder = CoverageFinder(self._capture, self._params)
        covered = finder.find(x, outputs, calls, samples=1).covered if calls else frozenset()
        of_layer = {call.rule.layer: call.places for call in calls}
        holders = Counter(i for places in of_layer.values() for i in places.values())
        return {
            places["weight"]: places.get("bias")
            for places in of_layer.values()
            if "weight" in places and all(i in covered and holders[i] == 1 for i in places.values())
        }
