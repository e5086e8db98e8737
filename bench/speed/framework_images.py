"""Images and the course's MLP in Lightning, accelerate and Avalanche."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import clext
from clext.training.models import mlp
from speed.framework_case import CLIP, LR, STEPS, Framework, steps

BATCH = 64


def images(number: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(STEPS * BATCH, 784, generator=generator)
    return TensorDataset(x, torch.randint(10, (len(x),), generator=generator))


def loaders() -> list[DataLoader]:
    return [DataLoader(images(number), batch_size=BATCH) for number in range(2)]


def seeded_mlp() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


def losses_of(model: nn.Module, loader: DataLoader) -> Iterable[Any]:
    return (lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in loader)


def images_by_hand(model: nn.Module, tasks: Sequence[Any]) -> None:
    method = clext.EWC(model)
    for loader in tasks:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        steps(method, model.parameters(), optimizer, losses_of(model, loader))
        method.consolidate(loader)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


def module() -> nn.Module:
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded_mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    return Module()


def lightning_without(module, tasks):
    from lightning.pytorch import Trainer

    for loader in tasks:
        trainer = Trainer(**QUIET, gradient_clip_val=CLIP)
        trainer.fit(module, loader)


def lightning_glued(module, tasks):
    from lightning.pytorch import Trainer

    from clext.integrations.lightning import ContinualCallback

    method = clext.EWC(module)
    for loader in tasks:
        callback = ContinualCallback(method, consolidate=True)
        trainer = Trainer(**QUIET, gradient_clip_val=CLIP, callbacks=[callback])
        trainer.fit(module, loader)


def accelerate_without(model, tasks):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for loader in tasks:
        optimizer = clext.optim.AdamW(
            model.parameters(),
            lr=LR,
            max_grad_norm=CLIP,
        )
        net, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for x, y in loader:
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
            optimizer.zero_grad()


def accelerate_glued(model, tasks):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    method = clext.EWC(model)
    accelerator.register_for_checkpointing(method)
    for loader in tasks:
        optimizer = clext.optim.AdamW(
            model.parameters(),
            lr=LR,
            max_grad_norm=CLIP,
            method=method,
        )
        net, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for x, y in loader:
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
            optimizer.zero_grad()
        method.consolidate(loader)


def accelerate_by_hand(model: nn.Module, tasks: Sequence[Any]) -> None:
    """The same optimizer, which does all of a step."""
    method = clext.EWC(model)
    for loader in tasks:
        optimizer = clext.optim.AdamW(model.parameters(), lr=LR, max_grad_norm=CLIP, method=method)
        for loss in losses_of(model, loader):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        method.consolidate(loader)


def experiences() -> Sequence[Any]:
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset

    tasks = []
    for number in range(2):
        data = images(number)
        data.targets = data.tensors[1].tolist()
        tasks.append(as_classification_dataset(data))
    return benchmark_from_datasets(train=tasks).train_stream


def clipping(model: nn.Module) -> Any:
    """Avalanche clips nothing; this plugin, after the method's, is how one does."""
    from avalanche.core import SupervisedPlugin

    class Clipping(SupervisedPlugin):
        def before_update(self, *_: Any, **_k: Any) -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    return Clipping()


def avalanche_without(model, tasks):
    from avalanche.training.templates import SupervisedTemplate

    strategy = SupervisedTemplate(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LR),
        train_mb_size=BATCH,
        plugins=[clipping(model)],
        evaluator=None,
    )
    for experience in tasks:
        strategy.train(experience, shuffle=False)


def avalanche_glued(model, tasks):
    from avalanche.training.templates import SupervisedTemplate

    from clext.integrations.avalanche import ClextPlugin

    method = clext.EWC(model)
    strategy = SupervisedTemplate(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LR),
        train_mb_size=BATCH,
        plugins=[ClextPlugin(method), clipping(model)],
        evaluator=None,
    )
    for experience in tasks:
        strategy.train(experience, shuffle=False)


def avalanche_by_hand(model: nn.Module, tasks: Sequence[Any]) -> None:
    """One optimizer for all tasks."""
    method = clext.EWC(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for experience in tasks:
        loader = DataLoader(experience.dataset, batch_size=BATCH)
        steps(method, model.parameters(), optimizer, losses_of(model, loader))
        method.consolidate(loader)


IMAGES = {
    "Lightning": Framework(
        "lightning", module, loaders, lightning_without, lightning_glued, images_by_hand
    ),
    "accelerate": Framework(
        "accelerate",
        seeded_mlp,
        loaders,
        accelerate_without,
        accelerate_glued,
        accelerate_by_hand,
    ),
    "Avalanche": Framework(
        "avalanche",
        seeded_mlp,
        experiences,
        avalanche_without,
        avalanche_glued,
        avalanche_by_hand,
    ),
}
