"""What docs/frameworks.md shows is run as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from toy_training import make_model, make_task

import clext

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "frameworks.md"


def blocks(section):
    """The code of a section of the page."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(section, **names):
    """Its first block, among the names that the page takes for granted."""
    code = blocks(section)[0]
    assert len(code.strip().splitlines()) <= 10
    names = {"clext": clext, **names}
    exec(compile(code, f"{PAGE.name}: {section}", "exec"), names)
    return names


def loaders():
    return [DataLoader(make_task(number, torch.float32), batch_size=None) for number in range(2)]


def test_lightning(monkeypatch, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)  # where it writes its checkpoints

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_model(torch.float32)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    assert run("Lightning", module=Module(), tasks=loaders())["method"].tasks == 2


def language_model(transformers):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 8}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(config)


def texts(number):
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(11, (8, 8), generator=generator).tolist()
    return [{"input_ids": entry, "labels": entry} for entry in tokens]


def arguments(kind, folder):
    return kind(str(folder), max_steps=2, use_cpu=True, bf16=False, report_to="none")


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = run(
        "Transformers",
        model=language_model(transformers),
        args=arguments(transformers.TrainingArguments, tmp_path),
        tasks=[texts(0), texts(1)],
    )
    assert names["method"].tasks == 2
    assert all(entry.max() > 0 for entry in names["method"].importance.values())


def test_trl(tmp_path):
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")

    class Trainer(trl.SFTTrainer):
        """With a tokenizer, which it would look for beside the weights of a model."""

        def __init__(self, *args, **kwargs):
            words = tokenizers.models.WordLevel({"0": 0}, unk_token="0")
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="0"
            )
            super().__init__(*args, processing_class=tokenizer, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "SFTTrainer", Trainer)
        names = run(
            "TRL",
            model=language_model(transformers),
            args=arguments(trl.SFTConfig, tmp_path),
            data=datasets.Dataset.from_list([{"input_ids": e["input_ids"]} for e in texts(0)]),
        )
    method = names["trainer"].method
    assert method.tasks == 1
    assert all(entry.max() > 0 for entry in method.importance.values())


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    data = [{key: torch.tensor(v) for key, v in entry.items()} for entry in texts(0)]
    names = run(
        "accelerate",
        accelerator=accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2),
        model=language_model(transformers),
        loader=DataLoader(data, batch_size=2),
    )
    try:
        assert names["method"].tasks == 1
        # By hand, with the method in no optimizer.
        accelerator, model, method = (names[name] for name in ("accelerator", "model", "method"))
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
        for batch in names["loader"]:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                code = compile(blocks("accelerate")[1], "by hand", "exec")
                exec(code, {**names, "optimizer": optimizer})
                optimizer.zero_grad()
        assert method.steps == 2
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_peft():
    pytest.importorskip("peft")
    loader, next_loader = loaders()
    names = run("PEFT", model=make_model(torch.float32), loader=loader, torch=torch)
    method, optimizer = names["method"], names["optimizer"]
    for batch in next_loader:
        method.loss(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert method.penalty() > 0
    exec(compile(blocks("PEFT")[1], "merged", "exec"), names | {"next_loader": next_loader})
    assert names["reg"].tasks == 2


def test_avalanche():
    pytest.importorskip("avalanche")
    from avalanche.benchmarks.scenarios import class_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training import Naive

    x, y = map(torch.cat, zip(*make_task(0, torch.float32), strict=True))
    data = torch.utils.data.TensorDataset(x, y)
    data.targets = y.tolist()
    streams = {"train": as_classification_dataset(data)}
    model = make_model(torch.float32)
    names = run(
        "Avalanche",
        model=model,
        Naive=Naive,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        benchmark=class_incremental_benchmark(streams, num_experiences=3),
    )
    assert names["method"].tasks == 3
