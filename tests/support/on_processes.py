"""A training in a framework, the same on one process and on two: python on_processes.py KIND OUT.

Started by torchrun, each process sees its share of every batch; alone, the whole of it. What every
process ends with goes to OUT/RANK.pt.
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import clext

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
BATCH = 16  # of all processes together
METHODS = {
    "ewc": lambda model: clext.EWC(model, strength=10.0),
    "si": lambda model: clext.SI(model, strength=10.0),
    "replay": lambda model: clext.Replay(model, budget=16),
}


def examples(task, count=80):
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(count, 6, generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, x[:, :3].argmax(1) + task % 2, strict=True)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def transformers(name, folder):
    from transformers import TrainingArguments
    from transformers.modeling_outputs import SequenceClassifierOutput

    from clext.integrations.transformers import ContinualTrainer

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels=None):
            logits = self.net(x)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    model = Classifier()
    method = METHODS[name](model)
    for task in range(2):
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH // SIZE,
            num_train_epochs=1,
            learning_rate=0.02,
            max_grad_norm=0.05,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = ContinualTrainer(model, args, train_dataset=examples(task), method=method)
        trainer.train()
        # Of 85 some are repeated, so that both processes have as many.
        more = ContinualTrainer(model, args, train_dataset=examples(task, 85), method=method)
        method.consolidate(more.get_train_dataloader())
    return model, method


def lightning(name, folder):
    from lightning.pytorch import LightningModule, Trainer

    from clext.integrations.lightning import ContinualCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            if name == "replay":
                return method.loss(batch)
            return nn.functional.cross_entropy(self(batch["x"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    model = Module()
    method = METHODS[name](model)
    for task in range(2):
        data = examples(task)
        sampler = DistributedSampler(data, SIZE, RANK, shuffle=False)  # Lightning's own shuffles
        loader = DataLoader(data, batch_size=BATCH // SIZE, sampler=sampler)
        Trainer(
            accelerator="cpu",
            devices=SIZE,
            strategy="ddp" if SIZE > 1 else "auto",
            use_distributed_sampler=False,
            max_epochs=1,
            gradient_clip_val=0.05,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[ContinualCallback(method, consolidate=True)],
        ).fit(model, loader)
    return model, method


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kind, name, out = sys.argv[1:]
    model, method = {"transformers": transformers, "lightning": lightning}[kind](name, out)
    state = method.state_dict()
    state["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.save(state, f"{out}/{RANK}.pt")
    if dist.is_initialized():  # threads of the group would else be there when the process ends
        dist.barrier()
        dist.destroy_process_group()
