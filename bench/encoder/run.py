"""A sentence encoder of 22 M parameters learns two text tasks: `python bench/encoder/run.py`.

Docstrings of eight modules of Python's standard library, told apart by a linear head on the mean of
the encoder's outputs; then those of eight others, by the same head. After it the first task is
tested again, and the encoder itself on texts of sixteen modules more. Each run, a method and a
seed, is a line in bench/results/encoder.jsonl. About a minute a run on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from peft import LoraConfig, get_peft_model

import clext
from clext.integrations.peft import MergedPenalty
from encoder import texts
from encoder.model import (
    Batch,
    Classifier,
    Tokens,
    accuracy,
    batches,
    embeddings,
    nearest_mean_accuracy,
)
from speed.timing import machine, record

TRAIN, TEST, OTHER = 48, 40, 24  # texts of each module
LENGTH, BATCH, EPOCHS = 24, 32, 2
LR = {"encoder": 3e-4, "head": 1e-2, "lora": 3e-3}

Make = Callable[[nn.Module, float | None], clext.Method]
METHODS: dict[str, tuple[Make, float | None]] = {  # and a strength found with another seed
    "fine-tuning": (lambda model, _: clext.Baseline(model), None),
    "EWC": (lambda model, s: clext.EWC(model, strength=s, samples=256), 1e5),
    "EWC, optimizer": (lambda model, s: clext.EWC(model, strength=s, fisher="optimizer"), 3e5),
    "SI": (lambda model, s: clext.SI(model, strength=s), 1e4),
    "replay": (lambda model, _: clext.Replay(model, budget=64), None),
    "LoRA": (lambda model, _: clext.Baseline(model), None),
    "LoRA, base protected": (lambda model, s: clext.EWC(model, strength=s, samples=256), 1e4),
}


class Run:
    """One method on one seed."""

    def __init__(self, name: str, strength: float | None, seed: int) -> None:
        torch.manual_seed(seed)
        tokens = Tokens(LENGTH)
        self.data = [[tokens(*part) for part in texts.task(k, seed, TRAIN, TEST)] for k in range(2)]
        self.others = tokens(*texts.others(OTHER))
        self.model = Classifier(len(texts.TASKS[0]))
        self.original = embeddings(self.model, self.others)
        self.by_lora = name.startswith("LoRA")
        self.method = METHODS[name][0](self.model, strength)
        self.found: dict[str, Any] = {"others": [self._others()]}

    def learn(self) -> dict[str, Any]:
        """Both tasks; what was measured."""
        optimizer = self._train(0, self.method)
        start = time.process_time()
        whole = self._shuffled(self.data[0][0])  # samples= are the first of them
        self.method.consolidate(optimizer if self.method.takes_optimizer else whole)
        self.found["consolidate_seconds"] = time.process_time() - start
        self._test(0)
        optimizer = self._train(1, self._adapted() if self.by_lora else self.method)
        self._test(1)
        self.found["method_bytes"] = tensor_bytes(self.method.state_dict())
        self.found["optimizer_bytes"] = tensor_bytes(optimizer.state_dict())
        return self.found

    def _train(self, k: int, method: clext.Method) -> torch.optim.Optimizer:
        self.model.train()
        method.begin_task()
        optimizer = self._optimizer(method)
        start = time.process_time()
        for _ in range(EPOCHS):
            for batch in self._shuffled(self.data[k][0]):
                method.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        self.found.setdefault("seconds", []).append(time.process_time() - start)
        return optimizer

    def _shuffled(self, data: Batch) -> list[Batch]:
        return batches(data, BATCH, torch.randperm(len(data["labels"])))

    def _adapted(self) -> clext.Method:
        """LoRA on all linear layers of the encoder; the head stays as it is trained."""
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=r"encoder.*(query|key|value|dense)",
            modules_to_save=["head"],
        )
        get_peft_model(self.model, config)
        if isinstance(self.method, clext.EWC):
            return MergedPenalty(self.method)
        return self.method

    def _optimizer(self, method: clext.Method) -> torch.optim.Optimizer:
        groups: dict[str, list[Tensor]] = {name: [] for name in LR}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                kind = "head" if "head" in name else "lora" if "lora_" in name else "encoder"
                groups[kind].append(parameter)
        return clext.optim.AdamW(
            [{"params": entries, "lr": LR[kind]} for kind, entries in groups.items() if entries],
            weight_decay=0.0,
            method=method,
        )

    # ------------------------------------------------------------------ tests

    def _test(self, k: int) -> None:
        tested = [accuracy(self.model, test) for _, test in self.data[: k + 1]]
        self.found.setdefault("accuracy", []).append(tested)
        self.found["others"].append(self._others())

    def _others(self) -> dict[str, float]:
        """What the encoder makes of texts of no task, and how near that is to the original."""
        now = embeddings(self.model, self.others)
        return {
            "accuracy": nearest_mean_accuracy(now, self.others["labels"]),
            "cosine": float(F.cosine_similarity(now, self.original).mean()),
        }


def tensor_bytes(state: object) -> int:
    """Of all tensors in nested containers."""
    if isinstance(state, Tensor):
        return state.nbytes
    entries = state.values() if isinstance(state, dict) else state
    return sum(map(tensor_bytes, entries)) if isinstance(state, dict | list | tuple) else 0


@click.command(help=__doc__)
@click.argument("methods", nargs=-1, type=click.Choice(list(METHODS)))
@click.option("--seed", "seeds", multiple=True, type=int, default=[0, 1, 2], show_default=True)
@click.option("--strength", "strengths", multiple=True, type=float, help="In place of the found.")
@click.option("--dry", is_flag=True, help="Print, record nothing.")
def main(
    methods: tuple[str, ...], seeds: tuple[int, ...], strengths: tuple[float, ...], dry: bool
) -> None:
    for seed in seeds:
        for name in methods or METHODS:
            for strength in strengths or [METHODS[name][1]]:
                found = Run(name, strength, seed).learn()
                entry = {"method": name, "strength": strength, "seed": seed, **found}
                print(entry, flush=True)
                if not dry:
                    record("encoder", {**entry, "machine": machine("cpu")})


if __name__ == "__main__":
    main()
