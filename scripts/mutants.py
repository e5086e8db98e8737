"""Whether the tests notice a wrong sign: `python scripts/mutants.py [GROUP ...]`.

A mutant is one change of one line of clext. Each is made in a copy of the installed package, and
the tests of its group run on the copy up to the first failure. A mutant that none of them notices
is printed as SURVIVED, and the exit code is 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# [group] with folders of tests/, a file in clext/, then old text => new text.
TABLE = """
[step] ops methods optim training bench
ops/reference/path.py
    gain.sub_(path_change(task_grad, wide( => gain.add_(path_change(task_grad, wide(
    score.add_(gain.clamp(min=0) / => score.add_(gain /
ops/reference/penalty.py
    wide(grad) + 2 * strength => wide(grad) + strength
ops/kernels.py
    or forward_ad._current_level >= 0 => or False
methods/rwalk.py
    return 1.0 - self.alpha => return self.alpha
    interval_steps >= self.interval => interval_steps > self.interval
    / (self.task_steps + 1) => / (self.task_steps + 2)
optim/plans.py
    and value.dtype == state_dtype(parameter.dtype) => and True
optim/adam.py
    beta1, beta2 = group => beta2, beta1 = group
training/steps.py
    return loss + self.optimizer.penalty => return loss
methods/agem.py
    -product / square => product / square
methods/der.py
    self.strength * F.mse_loss => F.mse_loss
    self.beta * self.heads => self.heads
methods/er_ace.py
    if self.tasks > 0: => if True:
methods/l2.py
    (ones, 0.0) => (ones, 1.0)
methods/rehearsal.py
    or not torch.is_grad_enabled(): => :
methods/parts/factored_state.py
    2 * strength * part => strength * part
    F.pad(factors, (0, new, 0, new)) => F.pad(factors, (new, 0, new, 0))
methods/gem.py
    margin + largest * scale => largest * scale
[bases] methods data training
methods/quadratic.py
    penalty = self.strength * => penalty = 2 * self.strength *
methods/base.py
    self.tasks + 1, self.steps, 0 => self.tasks + 2, self.steps, 0
    self.strength = checked_strength(type(self), state => checked_strength(type(self), state
methods/parts/state.py
    name in values or entry.requires_grad or entry.grad is not None => True
    self.dtype is None or key not in CONSOLIDATED => True
    {name: entry.clone() for => {name: entry for
    same.get(id(parameter), by_name.get(name)) => by_name.get(name)
methods/parts/step.py
    self._pulled.writes + 1 => self._pulled.writes
methods/parts/flat.py
    {key: _decoded(entry, flat) for key => {str(key): _decoded(entry, flat) for key
methods/parts/heads.py
    self.blocks[:ended] => self.blocks[: ended + 1]
    return max((block.stop => return min((block.stop
methods/rehearsal.py
    1 / (self.tasks + 1) => 1 / (self.tasks + 2)
methods/parts/teacher.py
    temperature**2 => temperature
[importance] core importance methods bench
core/likelihood.py
    label : label + 1, t].sqrt() => label : label + 1, t]
    <= uniform => >= uniform
    (p * (1 - p)).sqrt() => p * (1 - p)
    return labels - outputs.to(labels.dtype).sigmoid() => return outputs.sigmoid() - labels
    (known != IGNORED) => (known != 0)
core/supervision.py
    labels[:, 1:], (0, 1) => labels[:, :-1], (1, 0)
importance/fisher.py
    -likelihood.score(-by_class => -likelihood.score(by_class
importance/kronecker.py
    pair.outputs.div_(max(1, rows_of_layer)) => pair.outputs.div_(count)
    holders[i] == 1 => True
importance/mas.py
    [2 * outputs] => [outputs]
importance/scp.py
    count**2 => count
importance/batch_mean.py
    cotangent / count => cotangent
importance/nodes.py
    sign * argument.node._saved_alpha => argument.node._saved_alpha
    (variance + eps).rsqrt() => (variance + eps).sqrt()
importance/rule.py
    function(multiplied + looked_up) - function(multiplied) => function(multiplied + looked_up)
importance/layout.py
    filled[self.owners, self.places] => filled[self.owners.flip(0), self.places]
importance/rules/norms.py
    F.batch_norm(inputs, mean, => F.batch_norm(inputs, -mean,
methods/ewc.py
    seed=self.seed + self.tasks => seed=self.seed
    self.gamma * self.constant + => self.constant +
methods/si.py
    self.clamp == "total" => self.clamp == "task"
methods/mas.py
    (sensitivity, self.gamma) => (sensitivity, 1.0)
[metrics] training data
training/metrics.py
    accuracy[k, : k + 1].mean() => accuracy[k, :k].mean()
    np.nanmax(accuracy[:last, :last], axis=0) => np.diagonal(accuracy)[:last]
    (best - accuracy[last, :last]) => (accuracy[last, :last] - best)
    np.diagonal(accuracy)[:last]) => np.diagonal(accuracy)[1 : last + 1])
    (before - untrained)[1:] => before - untrained
    np.diagonal(joint) - np.diagonal(accuracy) => np.diagonal(accuracy) - np.diagonal(joint)
    accuracies[:task] => accuracies[: task + 1]
    min(value, lowest.get(j, value)) => value
training/loop.py
    step % every => (step + 1) % every
    result.curve.append(fmean(accuracies)) => result.curve.append(accuracies[-1])
training/chance.py
    shares.amax(1).cumsum(0) => shares.cumsum(0).amax(1)
    shares.cumsum(0).amax(1) => shares.amax(1).cumsum(0)
[scenarios] data training bench
data/scenarios.py
    random = generator(seed) => random = generator(0)
    180 * k / tasks => 180 * (k + 1) / tasks
    math.radians(degrees) => -math.radians(degrees)
    - classes[0] + start => + start
    len(made) * classes => (len(made) + 1) * classes
data/scenario.py
    max(task, seen) + 1 => task + 1
data/own.py
    range(max(map(max, classes)) + 1) => range(max(map(max, classes)) + 2)
    if incremental == "task": => if False:
training/task.py
    labels - start if start else labels => labels
core/seeding.py
    np.random.SeedSequence(seed).generate_state(4, np.uint32) => [seed] * 4
"""


def mutants() -> Iterator[tuple[str, ...]]:
    """Group, tests, file, old text and new text."""
    group = tests = file = ""
    for line in TABLE.strip().splitlines():
        if line.startswith("["):
            group, tests = line[1:].split("] ")
        elif not line.startswith(" "):
            file = line
        else:
            yield group, tests, file, *line.strip().split(" => ")


def survives(package: Path, tests: str, file: str, old: str, new: str) -> bool:
    room = f"tests/{file.partition('/')[0]}"  # its tests are the first
    folders = sorted((f"tests/{name}" for name in tests.split()), key=lambda name: name != room)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "clext"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"clext/{file}: expected this text once: {old}"
        (copy / file).write_text(text.replace(old, new))
        # -P: the copy, and not what is in the current folder.
        command = [sys.executable, "-P", "-m", "pytest", "-xqp", "no:cacheprovider", *folders]
        environ = {**os.environ, "PYTHONPATH": place, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False)
    if done.returncode > 1:
        raise SystemExit(f"pytest could not run:\n{done.stdout.decode()}")
    return done.returncode == 0


def main(groups: list[str]) -> None:
    import clext

    chosen = [mutant for mutant in mutants() if mutant[0] in groups or not groups]
    alive = []
    for _, tests, file, old, new in chosen:
        alive.append(survives(Path(clext.__file__).parent, tests, file, old, new))
        print(f"{'SURVIVED' if alive[-1] else 'caught  '} {file}: {old} => {new}", flush=True)
    print(f"{alive.count(False)} of {len(chosen)} mutants were caught")
    raise SystemExit(any(alive))


if __name__ == "__main__":
    main(sys.argv[1:])
