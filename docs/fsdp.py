"""Two tasks on a sharded Transformer: FSDP2, a method, checkpoints, and a run that goes on.

    torchrun --nproc_per_node 2 docs/fsdp.py --method ewc --folder runs/fsdp

Stopped at any time (or by --stop-after), the same line goes on from the last checkpoint, also with
another number of processes. EWC takes its importance from Adam's second moment, SI its own from the
steps, so that neither needs a pass over data, which would hold the whole model on each process.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import clext

VOCABULARY, LENGTH, WIDTH, LAYERS = 64, 16, 32, 2
STEPS, BATCH, TASKS = 20, 8, 2


class Transformer(nn.Module):
    """A small language model, of random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [N, T, VOCABULARY] of the next token."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


def batch_of(task: int, step: int, device: torch.device) -> torch.Tensor:
    """Tokens [BATCH, LENGTH]; a task is a number that is added from one to the next."""
    seed = (task * STEPS + step) * dist.get_world_size() + dist.get_rank()
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return ((start + (3 + 2 * task) * torch.arange(LENGTH)) % VOCABULARY).to(device)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss of the next tokens."""
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    """Train, from the newest checkpoint on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("ewc", "si"), default="ewc")
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp"))
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--stop-after", type=int, help="steps, of all tasks")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank(0))
        torch.cuda.set_device(device)
    dist.init_process_group()
    torch.manual_seed(0)
    model = Transformer().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)

    if options.method == "ewc":
        method = clext.EWC(model, strength=1e4, fisher="optimizer")
    else:
        method = clext.SI(model, strength=10.0)
    optimizer = clext.optim.AdamW(
        model.parameters(), lr=3e-3, weight_decay=0.0, method=method, max_grad_norm=1.0
    )

    done = 0
    newest = max(options.folder.glob("step-*/.metadata"), key=step_of, default=None)
    if newest is not None:
        done = step_of(newest)
        load(newest.parent, model, optimizer, method)

    for step in range(done, TASKS * STEPS):
        task, of_task = divmod(step, STEPS)
        loss_of(model, batch_of(task, of_task, device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if of_task == STEPS - 1:
            method.consolidate(optimizer if method.takes_optimizer else None)
        if (step + 1) % options.every == 0:
            save(options.folder / f"step-{step + 1}", model, optimizer, method)
        done = step + 1
        if done == options.stop_after:
            break

    with torch.no_grad():
        losses = [loss_of(model, batch_of(task, -1 - task, device)) for task in range(TASKS)]
    dist.all_reduce(found := torch.stack(losses), op=dist.ReduceOp.SUM)
    penalty = optimizer.penalty.full_tensor()  # on all processes
    if dist.get_rank() == 0:
        means = ", ".join(f"{value:.6f}" for value in (found / dist.get_world_size()).tolist())
        print(f"{method.name}: step {done}, losses {means}, penalty {penalty.item():.6g}")
    dist.destroy_process_group()


def step_of(metadata: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(metadata.parent.name.removeprefix("step-"))


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: clext.Method
) -> dict[str, Any]:
    """All that a run goes on from."""
    parameters, averages = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": averages, "method": method}


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, method: clext.Method
) -> None:
    """Each process writes what it has; `.metadata` comes last."""
    dcp.save(state_of(model, optimizer, method), checkpoint_id=folder)


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, method: clext.Method
) -> None:
    """Each process reads what it has now."""
    state = state_of(model, optimizer, method)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


if __name__ == "__main__":
    main()
