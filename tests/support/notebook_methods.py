"""What the course's notebook computes, one parameter and one step at a time: the oracle.

Each object keeps plain dicts and lets autograd differentiate the penalty. Nothing is checked.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def underscored(name):
    return name.replace(".", "__")


class Notebook:
    def start(self, model, dataloader, device):
        self.model, self.dataloader, self.device = model, dataloader, device
        self.params = dict(model.named_parameters())

    def zeros(self, rename=str):
        return {rename(name): torch.zeros_like(p) for name, p in self.params.items()}

    def now(self, rename=str):
        return {rename(name): p.detach().clone() for name, p in self.params.items()}

    def guard_sum(self, guards, rename=str):
        total = self.zeros(rename)
        for guard in guards:
            if guard:
                total = {name: total[name] + guard[name] for name in total}
        return total

    def gradients_of_batches(self, objective):
        self.model.eval()
        for x, *labels in self.dataloader or []:
            self.model.zero_grad()
            output = self.model(x.to(self.device))
            objective(output, *(y.to(self.device) for y in labels[:1])).backward()
            yield {name: p.grad for name, p in self.params.items()}

    def squared_distance(self, model, importance, anchor, rename=str):
        return sum(
            (importance[rename(name)] * (p - anchor[rename(name)]) ** 2).sum()
            for name, p in model.named_parameters()
        )

    def update(self, model):
        pass


class Baseline(Notebook):
    def __init__(self, model, dataloader, device):
        self.start(model, dataloader, device)
        self._precision_matrices, self.p_old = self._calculate_importance(), self.now()

    def _calculate_importance(self):
        return self.zeros()

    def penalty(self, model):
        return self.squared_distance(model, self._precision_matrices, self.p_old)


class EWC(Baseline):
    def __init__(self, model, dataloader, device, prev_guards=()):
        self.start(model, dataloader, device)
        self.previous_guards_list = prev_guards
        self._precision_matrices, self.p_old = self._calculate_importance(), self.now()

    def _calculate_importance(self):
        return self.calculate_importance()  # so it is named in the notebook's MAS and SCP

    def calculate_importance(self):
        importance = self.guard_sum(self.previous_guards_list)
        for grads in self.gradients_of_batches(self.objective):
            for name, grad in grads.items():
                importance[name] += self.size(grad) / len(self.dataloader)
        return importance

    def objective(self, output, label):
        return F.nll_loss(F.log_softmax(output, dim=1), label)

    def size(self, grad):
        return grad**2


class MAS(EWC):
    def objective(self, output, label=None):  # noqa: ARG002
        return torch.stack([(row**2).sum() for row in output]).mean()

    def size(self, grad):
        return grad.abs()


class SCP(EWC):
    def __init__(self, model, dataloader, L, device, prev_guards=()):
        self.L = L
        super().__init__(model, dataloader, device, prev_guards)
        self._state_parameters = self.p_old

    def penalty(self, model):
        return self.squared_distance(model, self._precision_matrices, self._state_parameters)

    def objective(self, output, label=None):  # noqa: ARG002
        columns = np.random.randn(output.shape[1], self.L)  # noqa: NPY002
        columns = columns / np.linalg.norm(columns, axis=0)
        directions = torch.from_numpy(columns.T).to(self.device, output.dtype)
        total = 0
        for direction in directions:
            total = total + direction @ output.mean(dim=0)
        return total / self.L


class SI(Notebook):
    def __init__(self, model, dataloader, epsilon, device):
        self.start(model, dataloader, device)
        self.epsilon = epsilon
        self._n_p_prev, self._n_omega = self._calculate_importance()
        self.W, self.p_old = self._init_()

    def _init_(self):
        return self.zeros(underscored), self.now(underscored)

    def _calculate_importance(self):
        anchor, omega = self.now(underscored), self.zeros(underscored)
        for name, p in anchor.items():
            if self.dataloader is not None:
                change = p - getattr(self.model, name + "_SI_prev_task")
                gain = getattr(self.model, name + "_W") / self.denominator(name, change)
                old = getattr(self.model, name + "_SI_omega", omega[name])
                omega[name] = self.merge(old, gain)
                self.model.register_buffer(name + "_SI_omega", omega[name])
            self.model.register_buffer(name + "_SI_prev_task", p)
        return anchor, omega

    def denominator(self, name, change):  # noqa: ARG002
        return change**2 + self.epsilon

    def merge(self, old, gain):
        return old + gain

    def penalty(self, model):
        return self.squared_distance(model, self._n_omega, self._n_p_prev, underscored)

    def update(self, model):
        for dotted, p in model.named_parameters():
            name = underscored(dotted)
            if p.grad is not None:
                self.W[name] += -p.grad * (p.detach() - self.p_old[name])
                self.model.register_buffer(name + "_W", self.W[name])
            self.p_old[name] = p.detach().clone()


class RWalk(SI):
    def __init__(self, model, dataloader, epsilon, device, prev_guards=()):
        self.start(model, dataloader, device)
        self.epsilon, self.previous_guards_list = epsilon, prev_guards
        self._precision_matrices = self._calculate_importance_ewc()
        self._n_p_prev, self._n_omega = self._calculate_importance()
        self.W, self.p_old = self._init_()

    def _calculate_importance_ewc(self):
        fisher = self.guard_sum(self.previous_guards_list, underscored)
        if self.dataloader is not None:
            fisher = {name: 0.6 * entry for name, entry in fisher.items()}
        for grads in self.gradients_of_batches(F.cross_entropy):
            for name, grad in grads.items():
                fisher[underscored(name)] += 0.4 * grad**2 / len(self.dataloader)
        return fisher

    def denominator(self, name, change):
        return 0.5 * self._precision_matrices[name] * change**2 + self.epsilon

    def merge(self, old, gain):
        return 0.5 * old + 0.5 * gain

    def penalty(self, model):
        both = {name: self._n_omega[name] + self._precision_matrices[name] for name in self.W}
        return self.squared_distance(model, both, self._n_p_prev, underscored)
