"""Each method in its slow, obvious form: plain lists of tensors, and autograd for the penalty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from toy_training import STEPS, TASKS, make_task

from clext import EWC, L2, MAS, SCP, SI, Baseline, RWalk


class Naive:
    """Keeps plain lists, one tensor per parameter, and lets autograd differentiate the penalty."""

    def __init__(self, model, strength):
        self.model, self.strength = model, strength
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.omega = self.zeros()
        self.anchor = self.now()

    def zeros(self):
        return [torch.zeros_like(p) for p in self.params]

    def now(self):
        return [p.detach().clone() for p in self.params]

    def penalty(self):
        terms = zip(self.omega, self.params, self.anchor, strict=True)
        return self.strength * sum((w * (p - a) ** 2).sum() for w, p, a in terms)

    def before_step(self, task_grads):
        self.grads, self.old = task_grads, self.now()

    def after_step(self):
        pass

    def end_task(self, batches):
        pass

    def gradients(self, value):
        found = torch.autograd.grad(value, self.params, retain_graph=True, allow_unused=True)
        pairs = zip(found, self.params, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def train(self, tasks=TASKS):
        for number in range(tasks):
            batches = make_task(number)
            optimizer = torch.optim.Adam(self.params, lr=0.02)
            for x, y in batches:
                loss = F.cross_entropy(self.model(x), y)
                self.before_step(self.gradients(loss))
                optimizer.zero_grad()
                (loss + self.penalty()).backward()
                optimizer.step()
                self.after_step()
            self.end_task(batches)
        return self


class NaiveEWC(Naive):
    kind, gamma, anchors, weighting = "empirical", 1.0, "latest", "mean"

    def fisher(self, batches):
        total, count = self.zeros(), sum(len(x) for x, _ in batches)
        for x, y in batches:
            if self.kind == "batch":
                for t, g in zip(
                    total, self.gradients(F.cross_entropy(self.model(x), y)), strict=False
                ):
                    t += len(x) * g**2 / count
                continue
            for n in range(len(x)):
                logits = self.model(x[n : n + 1])
                log_p = (-logits if self.kind == "reversed" else logits).log_softmax(1)[0]
                for k in range(len(log_p)):
                    p = log_p[k].detach().exp() if self.kind == "exact" else float(k == y[n])
                    for t, g in zip(total, self.gradients(log_p[k]), strict=False):
                        t += p * g**2 / count
        return total

    def penalty(self):
        if self.anchors == "latest":
            return super().penalty()
        total = torch.zeros((), dtype=torch.float64)
        for age, (fisher, anchor) in enumerate(reversed(getattr(self, "old_tasks", []))):
            for w, p, a in zip(fisher, self.params, anchor, strict=True):
                total = total + self.gamma**age * (w * (p - a) ** 2).sum()
        return self.strength * total

    def end_task(self, batches):
        fisher = self.fisher(batches)
        if self.weighting == "sum":
            fisher = [f * sum(len(x) for x, _ in batches) for f in fisher]
        self.old_tasks = [*getattr(self, "old_tasks", []), (fisher, self.now())]
        self.omega = [self.gamma * w + f for w, f in zip(self.omega, fisher, strict=False)]
        self.anchor = self.now()


class NaiveL2(Naive):
    def end_task(self, _batches):
        self.omega = [torch.ones_like(p) for p in self.params]
        self.anchor = self.now()


class NaiveMAS(Naive):
    estimator, gamma = "per_sample", 1.0

    def end_task(self, batches):
        self.omega = [self.gamma * w for w in self.omega]
        count = sum(len(x) for x, _ in batches)
        for x, _ in batches:
            parts = [x] if self.estimator == "batch" else x.split(1)
            for part in parts:
                value = self.model(part).square().sum(1).mean()
                for w, g in zip(self.omega, self.gradients(value), strict=True):
                    w += len(part) / count * g.abs()
        self.anchor = self.now()


class NaiveSCP(Naive):
    def end_task(self, batches):
        mean_output = torch.cat([self.model(x) for x, _ in batches]).mean(0)
        for value in mean_output:
            for w, g in zip(self.omega, self.gradients(value), strict=True):
                w += g**2 / len(mean_output)
        self.anchor = self.now()


class NaiveSI(Naive):
    xi, clamp = 0.1, "task"

    def __init__(self, model, strength):
        super().__init__(model, strength)
        self.path = self.zeros()

    def after_step(self):
        for s, g, new, old in zip(self.path, self.grads, self.now(), self.old, strict=True):
            s -= g * (new - old)

    def end_task(self, batches):  # noqa: ARG002
        for w, s, new, start in zip(self.omega, self.path, self.now(), self.anchor, strict=True):
            gain = s / ((new - start) ** 2 + self.xi)
            w += gain if self.clamp == "total" else gain.clamp(min=0)
            w.clamp_(min=0)
        self.anchor, self.path = self.now(), self.zeros()


class NaiveRWalk(Naive):
    alpha, interval, eps, mix = 0.9, 10, 1e-3, 0.5

    def __init__(self, model, strength):
        super().__init__(model, strength)
        self.fisher, self.score, self.task_score = self.zeros(), None, self.zeros()
        self.fall, self.start, self.steps = self.zeros(), self.now(), 0

    def after_step(self):
        for i, (g, new) in enumerate(zip(self.grads, self.now(), strict=True)):
            self.fall[i] -= g * (new - self.old[i])
            self.fisher[i] = self.alpha * g**2 + (1 - self.alpha) * self.fisher[i]
        self.steps += 1
        if self.steps == self.interval:
            self.close_interval()

    def close_interval(self):
        for i, new in enumerate(self.now()):
            distance = self.fisher[i] * (new - self.start[i]) ** 2 / 2
            self.task_score[i] += self.fall[i].clamp(min=0) / (distance + self.eps)
        self.fall, self.start, self.steps = self.zeros(), self.now(), 0

    def end_task(self, batches):  # noqa: ARG002
        if self.steps:
            self.close_interval()
        if self.score is None:
            self.score = self.task_score
        else:
            pairs = zip(self.score, self.task_score, strict=True)
            self.score = [(1 - self.mix) * old + self.mix * new for old, new in pairs]
        self.task_score = self.zeros()
        top_fisher = max(f.max() for f in self.fisher)
        top_score = max(s.max() for s in self.score)
        pairs = zip(self.fisher, self.score, strict=True)
        self.omega = [f / top_fisher + s / top_score for f, s in pairs]
        self.anchor = self.now()


class NaiveReleasedRWalk(NaiveRWalk):
    def __init__(self, model, strength):
        super().__init__(model, strength)
        self.squares = self.zeros()

    def after_step(self):
        for i, (g, new) in enumerate(zip(self.grads, self.now(), strict=True)):
            self.fall[i] -= g * (new - self.old[i])
            self.squares[i] += g**2
        self.steps += 1  # of the task
        # Looked at before the next step, by that step's number.
        if (self.steps + 1) % self.interval == 0:
            self.close_interval()

    def close_interval(self):
        for i, new in enumerate(self.now()):
            distance = self.fisher[i] * (new - self.start[i]) ** 2
            self.task_score[i] += self.fall[i].clamp(min=0) / (distance + self.eps)
            # The squares of the whole task so far, not those of the interval.
            added = self.squares[i] / self.interval
            self.fisher[i] = (1 - self.alpha) * self.fisher[i] + self.alpha * added
        self.drop_interval()

    def drop_interval(self):
        self.fall, self.start = self.zeros(), self.now()

    def end_task(self, batches):  # noqa: ARG002
        self.drop_interval()
        self.squares, self.steps = self.zeros(), 0
        if self.score is None:
            self.score = self.task_score
        else:
            pairs = zip(self.score, self.task_score, strict=True)
            self.score = [
                old + (1 - self.mix) * old + self.mix * new for old, new in pairs
            ]  # old + (old + new) / 2 by default
        self.task_score = self.zeros()
        parts = [self.scaled(self.fisher), self.scaled(self.score)]
        self.omega = [f + s for f, s in zip(*parts, strict=True)]
        self.anchor = self.now()

    def scaled(self, tensors):
        flat = torch.cat([entry.flatten() for entry in tensors])
        return [(entry - flat.min()) / (flat.max() - flat.min()) for entry in tensors]


# Method, its naive form, strength, options.
CASES = {
    "baseline": (Baseline, Naive, 0.0, {}),
    "ewc": (EWC, NaiveEWC, 20.0, {}),
    "ewc exact": (EWC, NaiveEWC, 20.0, {"fisher": "exact", "gamma": 0.7}),
    "l2": (L2, NaiveL2, 0.1, {}),
    "ewc reversed": (EWC, NaiveEWC, 5.0, {"fisher": "reversed"}),
    "ewc batch": (EWC, NaiveEWC, 20.0, {"fisher": "batch"}),
    "ewc all": (EWC, NaiveEWC, 20.0, {"anchors": "all", "gamma": 0.7}),
    "ewc sum": (EWC, NaiveEWC, 0.5, {"weighting": "sum", "gamma": 0.9}),
    "mas": (MAS, NaiveMAS, 1.0, {}),
    "mas batch": (MAS, NaiveMAS, 1.0, {"estimator": "batch"}),
    "mas gamma": (MAS, NaiveMAS, 1.0, {"gamma": 0.3}),
    "si": (SI, NaiveSI, 2.0, {"xi": 0.05}),
    "si total": (SI, NaiveSI, 2.0, {"xi": 0.05, "clamp": "total"}),
    "rwalk": (RWalk, NaiveRWalk, 1.0, {"interval": 4, "eps": 1e-2, "alpha": 0.8, "mix": 0.3}),
    "rwalk whole": (RWalk, NaiveRWalk, 1.0, {"interval": STEPS}),
    "rwalk released": (
        RWalk,
        NaiveReleasedRWalk,
        1.0,
        {"variant": "released", "interval": 5, "eps": 1e-2, "alpha": 0.8, "mix": 0.3},
    ),
    "scp": (SCP, NaiveSCP, 5.0, {}),
}
