"""What docs/processes.md says is started by torchrun, as it says it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parents[2]


def torchrun(script, *options, folder):
    """Two processes; their output. They end by themselves or after two minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    found = subprocess.run(
        [*command, "--standalone", str(script), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_the_script_with_ddp(tmp_path):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "processes.md").read_text(), re.DOTALL
    )
    (block,) = [block for block in blocks if block.startswith("# torchrun")]
    assert block.startswith("# torchrun --nproc_per_node 2 ddp.py\n")
    (tmp_path / "ddp.py").write_text(block)
    # Text and line end may be written apart, and those of the other process come between.
    found = re.findall(
        r"process (\d): importance (\d+\.\d{6})", torchrun("ddp.py", folder=tmp_path)
    )
    assert sorted(process for process, _ in found) == ["0", "1"]
    (importance,) = {value for _, value in found}
    assert float(importance) > 0


def test_the_script_with_fsdp2_goes_on_where_it_was_stopped(tmp_path):
    script = ROOT / "docs" / "fsdp.py"
    whole = torchrun(script, "--folder", "whole", folder=tmp_path)
    assert whole.startswith("ewc: step 40, losses ")
    assert float(whole.rpartition("penalty ")[2]) > 0
    torchrun(script, "--folder", "stopped", "--stop-after", "27", folder=tmp_path)
    assert torchrun(script, "--folder", "stopped", folder=tmp_path) == whole


def test_the_script_with_fsdp2_and_si(tmp_path):
    found = torchrun(ROOT / "docs" / "fsdp.py", "--method", "si", folder=tmp_path)
    assert found.startswith("si: step 40, losses ")
    assert float(found.rpartition("penalty ")[2]) > 0


SHARDED = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import clext

dist.init_process_group("gloo")
folder, found = "checkpoint", []
for again in (False, True):
    torch.manual_seed(again)
    model = nn.Sequential()
    model.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))
{made}
    if not again:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        method.consolidate()
{saved}
    else:
{loaded}
    found.append([sum(v.full_tensor().sum().item() for v in method.importance.values())])
    found[-1] += [p.full_tensor().sum().item() for p in model.parameters()]
print(found[0] == found[1], found[0][0] > 0)
dist.destroy_process_group()
"""


def test_sharding_and_checkpoints_as_the_page_shows_them(tmp_path):
    page = (ROOT / "docs" / "processes.md").read_text()
    made, saved, loaded = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1:]
    (tmp_path / "sharded.py").write_text(
        SHARDED.format(
            made=indent(made, " " * 4), saved=indent(saved, " " * 8), loaded=indent(loaded, " " * 8)
        )
    )
    assert torchrun("sharded.py", folder=tmp_path).count("True True") == 2
