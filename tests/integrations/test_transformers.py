"""`ContinualTrainer`, the mixin over TRL's SFTTrainer and the checkpoints, against plain loops."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from framework_loops import plain_loop
from torch import nn
from toy_training import assert_same_state, make_model, make_task

import clext

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from clext.integrations.transformers import (  # noqa: E402
    ContinualMixin,
    ContinualTrainer,
    MethodCheckpoint,
)

CLIP = 0.05  # far below the norm of every gradient here
BATCH = 4


class Classifier(nn.Module):
    """As Transformers' models: entries of a dict in, loss and logits out."""

    def __init__(self):
        super().__init__()
        self.net = make_model(torch.float32)

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def language_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 8}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(config)


def task(number):
    """The examples of 11 batches."""
    batches = make_task(number, torch.float32)
    return [{"x": a, "labels": b} for x, y in batches for a, b in zip(x, y, strict=True)]


def texts(number, count=32):
    """Sequences of several lengths; what is padded has no part in the loss."""
    generator = torch.Generator().manual_seed(number)
    examples = []
    for index in range(count):
        tokens = torch.randint(11, (8,), generator=generator)
        labels = tokens.where(torch.arange(8) < 4 + index % 4, -100)
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def batches_of(examples):
    for start in range(0, len(examples), BATCH):
        chosen = examples[start : start + BATCH]
        yield {key: torch.stack([entry[key] for entry in chosen]) for key in chosen[0]}


def arguments(folder, kind=transformers.TrainingArguments, **options):
    return kind(
        str(folder),
        **{
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_grad_norm": CLIP,
            "bf16": False,
            **options,
        },
    )


def trained(folder, method_of, data, model=None, optimizer_of=None, tasks=1, **options):
    model = model or Classifier()
    method = method_of(model)
    for number in range(tasks):
        optimizer = optimizer_of and optimizer_of(model.parameters(), lr=0.02)
        trainer = ContinualTrainer(
            model,
            arguments(folder, **options),
            train_dataset=data(number),
            method=method,
            optimizers=(optimizer, None),
        )
        trainer.train()
        method.consolidate(trainer.get_train_dataloader())
    return model, method


def looped(method_of, data, model=None, optimizer_of=torch.optim.AdamW, tasks=1, **options):
    model = model or Classifier()
    method = method_of(model)
    for number in range(tasks):
        optimizer = optimizer_of(model.parameters(), lr=0.02, weight_decay=0.0)
        losses = [lambda b=b: model(**b)["loss"] for b in batches_of(data(number))]
        plain_loop(method, optimizer, losses, clip=CLIP, **options)
        method.consolidate(list(batches_of(data(number))))
    return model, method


def assert_same(one, other):
    assert_same_state(one[0].state_dict(), other[0].state_dict())
    assert_same_state(one[1].state_dict(), other[1].state_dict())


def loss_decrease(method):
    return sum(entry.sum() for entry in method.state_dict()["state"]["path"].values())


# ----------------------------------------------------------------------------- the Trainer


@pytest.mark.parametrize("kind", [clext.EWC, clext.SI, clext.RWalk])
def test_the_loop_with_clipping(kind, tmp_path):
    found = trained(tmp_path, kind, task, tasks=2)
    assert_same(found, looped(kind, task, tasks=2))


def test_the_loop_with_accumulation(tmp_path):
    """The last step of an epoch has three batches of four, and the Trainer divides by three."""
    data = lambda number: task(number)[: 8 * BATCH]  # noqa: E731
    found = trained(tmp_path, clext.SI, data, tasks=2, gradient_accumulation_steps=4)
    assert found[1].steps == 0
    assert_same(found, looped(clext.SI, data, tasks=2, accumulate=4))


def test_the_loop_in_bfloat16(tmp_path):
    found = trained(tmp_path, clext.SI, task, tasks=2, bf16=True)
    assert_same(found, looped(clext.SI, task, tasks=2, autocast=torch.bfloat16))


def test_a_language_model_whose_loss_counts_the_tokens_of_all_its_batches(tmp_path):
    model = language_model()
    found = trained(tmp_path, clext.SI, texts, model, tasks=2, gradient_accumulation_steps=4)
    expected = language_model()
    method = clext.SI(expected)
    for number in range(2):
        optimizer = torch.optim.AdamW(expected.parameters(), lr=0.02, weight_decay=0.0)
        batches = list(batches_of(texts(number)))
        for start in range(0, len(batches), 4):
            few = batches[start : start + 4]
            tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in few)
            # Four times, and divided by four again.
            losses = [
                lambda b=b, n=tokens: 4 * expected(**b, num_items_in_batch=n).loss for b in few
            ]
            plain_loop(method, optimizer, losses, accumulate=4, clip=CLIP)
        method.consolidate()
    assert_same(found, (expected, method))


def test_si_sees_the_gradient_before_it_is_clipped(tmp_path):
    """0.0104 with the method in the optimizer under a plain Trainer that clips, not 0.0209."""

    def decrease(max_grad_norm):
        model = Classifier()
        method = clext.SI(model)
        optimizer = clext.optim.AdamW(model.parameters(), lr=0.02)
        options = arguments(tmp_path, max_grad_norm=max_grad_norm)
        ContinualTrainer(
            model, options, train_dataset=task(0), method=method, optimizers=(optimizer, None)
        ).train()
        optimizer.step()  # which is the user's again, and not followed
        return float(loss_decrease(method))

    # Adam moves as far by a tenth of the gradient, so the same loss is lost.
    assert decrease(1e-3) == pytest.approx(decrease(0.0), rel=0.02)


def test_a_penalty_in_the_loss_counts_as_often_as_there_are_batches_in_a_step(tmp_path):
    """Where the Trainer does not divide: docs/frameworks.md says so, and the adapter does not."""

    class Penalised(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + self.penalty()

    def begun():
        model = language_model()
        method = clext.EWC(model)
        method.importance = {name: torch.ones_like(p) for name, p in method.importance.items()}
        with torch.no_grad():
            for entry in model.parameters():
                entry.add_(0.01)
        return model, method

    few = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-4, "max_grad_norm": 0.0}
    options = arguments(tmp_path, gradient_accumulation_steps=4, **few)
    found = []
    for share in (1, 4):
        model, method = begun()
        trainer = Penalised(model, options, train_dataset=texts(0))
        trainer.penalty = lambda method=method, share=share: method.penalty() / share
        trainer.train()
        found.append(model)
    adapted, method = begun()
    ContinualTrainer(adapted, options, train_dataset=texts(0), method=method).train()
    for whole, shared, once in zip(*(m.parameters() for m in (*found, adapted)), strict=True):
        torch.testing.assert_close(shared, once, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(whole, once, rtol=1e-5, atol=1e-7)


def test_replay_makes_the_loss_and_is_divided_by_the_accumulation(tmp_path):
    data = lambda number: task(number)[: 8 * BATCH]  # noqa: E731
    kind = lambda model: clext.Combined(clext.SI(model), clext.Replay(model))  # noqa: E731
    found = trained(tmp_path, kind, data, tasks=2, gradient_accumulation_steps=4)
    expected = Classifier()
    method = kind(expected)
    for number in range(2):
        optimizer = torch.optim.AdamW(expected.parameters(), lr=0.02, weight_decay=0.0)
        losses = [lambda b=b: method.loss(b) for b in batches_of(data(number))]
        plain_loop(method, optimizer, losses, accumulate=4, clip=CLIP)
        method.consolidate(list(batches_of(data(number))))
    assert_same(found, (expected, method))


def test_a_step_that_the_scaler_skips_is_none(tmp_path, monkeypatch):
    """And gradients that are scaled still when the pull is added."""

    def run(bad):
        model = Classifier()
        method = clext.SI(model)
        data = task(0)
        if bad:
            data[12:12] = [
                {**entry, "x": torch.full_like(entry["x"], torch.inf)} for entry in data[:4]
            ]
        trainer = ContinualTrainer(model, arguments(tmp_path), train_dataset=data, method=method)
        # Accelerate has fp16 on a GPU alone; this is what it sets there.
        monkeypatch.setattr(trainer.accelerator, "native_amp", True)
        monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.train()
        assert method.steps == 11
        return [*model.parameters(), *method.state_dict()["state"]["path"].values()]

    for found, expected in zip(run(bad=True), run(bad=False), strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.abs().max() > 0


# ----------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, clext.optim.AdamW])
def test_resumed_in_mid_task(optimizer_of, tmp_path):
    def made(folder):
        model = Classifier()
        method = clext.SI(model)
        train = ContinualTrainer(
            model,
            arguments(folder, save_strategy="steps", save_steps=5),
            train_dataset=task(0),
            method=method,
            optimizers=(optimizer_of(model.parameters(), lr=0.02), None),
        )
        return model, method, train

    model, method, trainer = made(tmp_path / "whole")
    trainer.train()
    for given in (tmp_path / "whole" / "checkpoint-5", True):
        folder = "whole" if given is True else "other"
        resumed, after, trainer = made(tmp_path / folder)
        trainer.train(resume_from_checkpoint=given)
        assert_same((resumed, after), (model, method))


def test_a_plain_trainer_with_the_method_in_the_optimizer_and_its_state_in_the_checkpoints(
    tmp_path,
):
    def made():
        model = Classifier()
        method = clext.SI(model)
        train = transformers.Trainer(
            model,
            arguments(tmp_path, save_strategy="steps", save_steps=5, max_grad_norm=0.0),
            train_dataset=task(0),
            callbacks=[MethodCheckpoint(method)],
            optimizers=(clext.optim.AdamW(model.parameters(), lr=0.02, method=method), None),
        )
        return model, method, train

    model, method, trainer = made()
    trainer.train()
    resumed, after, trainer = made()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="clext")  # of a method that has not seen the same
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same((resumed, after), (model, method))


def test_back_to_the_best_checkpoint_with_the_model(tmp_path):
    model = Classifier()
    method = clext.SI(model)
    often = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    trainer = ContinualTrainer(
        model,
        # The loss falls, and the first checkpoint has the greatest.
        arguments(tmp_path, load_best_model_at_end=True, greater_is_better=True, **often),
        train_dataset=task(0),
        eval_dataset=task(0),
        method=method,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert method.steps == 5


def test_a_checkpoint_without_the_method(tmp_path):
    model = Classifier()
    options = arguments(tmp_path, save_strategy="steps", save_steps=5)
    transformers.Trainer(model, options, train_dataset=task(0)).train()
    trainer = ContinualTrainer(model, options, train_dataset=task(0), method=clext.SI(model))
    with pytest.raises(FileNotFoundError, match="si was not saved with this checkpoint"):
        trainer.train(resume_from_checkpoint=True)


# ----------------------------------------------------------------------------- refused


def refused(model, method, message, folder, optimizer=None):
    before = [entry.clone() for entry in model.parameters()]
    trainer = ContinualTrainer(
        model,
        arguments(folder),
        train_dataset=task(0),
        method=method,
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_method_of_another_model(tmp_path):
    message = "ContinualTrainer: 0 optimizers step parameters of the model that si was made for"
    refused(Classifier(), clext.SI(Classifier()), message, tmp_path)


def test_an_optimizer_that_has_the_method(tmp_path):
    model = Classifier()
    method = clext.SI(model)
    optimizer = clext.optim.AdamW(model.parameters(), lr=0.02, method=method)
    refused(model, method, "make it without method=", tmp_path, optimizer)


def test_no_method(tmp_path):
    with pytest.raises(TypeError, match="expected a method of clext, got str"):
        ContinualTrainer(Classifier(), arguments(tmp_path), method="si")


# ----------------------------------------------------------------------------- TRL


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")

    class ContinualSFTTrainer(ContinualMixin, trl.SFTTrainer):
        pass

    words = {str(number): number for number in range(11)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="0", eos_token="0"
    )

    def made(kind, model, number, **more):
        config = arguments(
            tmp_path, trl.SFTConfig, gradient_accumulation_steps=4, gradient_checkpointing=False
        )
        data = [{"input_ids": entry["input_ids"].tolist()} for entry in texts(number)]
        return kind(
            model,
            config,
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer,
            **more,
        )

    model, expected = language_model(), language_model()
    method, oracle = clext.SI(model), clext.SI(expected)
    for number in range(2):
        made(ContinualSFTTrainer, model, number, method=method).train()
        method.consolidate()

        plain = made(trl.SFTTrainer, expected, number)
        optimizer = torch.optim.AdamW(expected.parameters(), lr=0.02, weight_decay=0.0)
        batches = list(plain.get_train_dataloader())
        for start in range(0, len(batches), 4):
            few = batches[start : start + 4]
            tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in few)
            losses = [
                lambda b=b, n=tokens, plain=plain: (
                    4 * plain.compute_loss(expected, b, num_items_in_batch=n)
                )
                for b in few
            ]
            expected.train()
            plain_loop(oracle, optimizer, losses, accumulate=4, clip=CLIP)
        oracle.consolidate()
    assert_same((model, method), (expected, oracle))
