"""The adapters on two processes under DDP: as on one that sees the batches of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support" / "on_processes.py"


def run(kind, name, folder, processes):
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    found = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, kind, name, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("name", ["ewc", "si", "replay"])
@pytest.mark.parametrize("kind", ["transformers", "lightning"])
def test_as_on_one_process(kind, name, tmp_path):
    pytest.importorskip(kind)
    first, second = run(kind, name, tmp_path / "two", 2)
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key])
    if name == "replay":  # draws other examples than one process does
        memories = [state["extra"]["memory"] for state in (first, second)]
        for key, value in memories[0].pop("inputs").items():
            assert torch.equal(value, memories[1]["inputs"][key])
        assert torch.equal(memories[0]["labels"], memories[1]["labels"])
        assert memories[0]["seen"] == {0: 170 if kind == "transformers" else 160}
        return
    (alone,) = run(kind, name, tmp_path / "one", 1)
    for state in (first, second):
        for key, value in alone["parameters"].items():
            assert torch.allclose(state["parameters"][key], value, atol=2e-5), key
        for key, values in alone["state"].items():
            for parameter, value in values.items():
                found = state["state"][key][parameter]
                assert torch.allclose(found, value, rtol=1e-3, atol=1e-6), (key, parameter)
