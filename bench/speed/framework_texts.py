"""Texts and a small language model in Transformers, TRL and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import clext
from speed.framework_case import CLIP, LR, STEPS, Framework, steps

BATCH = 8


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def texts() -> Sequence[Any]:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 512, (2, STEPS * BATCH, 32), generator=generator).tolist()
    return [
        Dataset.from_list([{"input_ids": entry, "labels": entry} for entry in task])
        for task in tokens
    ]


def arguments(kind: Any) -> Any:
    return kind(
        "bench-frameworks",
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        max_grad_norm=CLIP,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )


def transformers_without(model, tasks):
    from transformers import Trainer, TrainingArguments

    for data in tasks:
        trainer = Trainer(model, arguments(TrainingArguments), train_dataset=data)
        trainer.train()


def transformers_glued(model, tasks):
    from transformers import TrainingArguments

    from clext.integrations.transformers import ContinualTrainer

    method = clext.EWC(model)
    for data in tasks:
        args = arguments(TrainingArguments)
        trainer = ContinualTrainer(model, args, train_dataset=data, method=method)
        trainer.train()
        method.consolidate(trainer.get_train_dataloader())


def trainer_by_hand(model: nn.Module, tasks: Sequence[Any], trainer_of: Any) -> None:
    """The batches and the loss are the Trainer's."""
    method = clext.EWC(model)
    for data in tasks:
        trainer = trainer_of(model, data)
        loader = list(trainer.get_train_dataloader())
        tokens = [(batch["labels"][:, 1:] != -100).sum() for batch in loader]
        model.train()
        losses = (
            partial(trainer.compute_loss, model, dict(batch), num_items_in_batch=count)
            for batch, count in zip(loader, tokens, strict=True)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        steps(method, model.parameters(), optimizer, losses)
        method.consolidate(loader)


def transformers_by_hand(model: nn.Module, tasks: Sequence[Any]) -> None:
    from transformers import Trainer, TrainingArguments

    args = arguments(TrainingArguments)
    trainer_by_hand(model, tasks, lambda model, data: Trainer(model, args, train_dataset=data))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"0": 0}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0")


def trl_without(model, tasks):
    from trl import SFTConfig, SFTTrainer

    for data in tasks:
        args = arguments(SFTConfig)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer())
        trainer.train()


def trl_glued(model, tasks):
    from trl import SFTConfig, SFTTrainer

    from clext.integrations.transformers import ContinualMixin

    class ContinualSFTTrainer(ContinualMixin, SFTTrainer): ...

    method = clext.EWC(model)
    for data in tasks:
        args = arguments(SFTConfig)
        trainer = ContinualSFTTrainer(
            model, args, train_dataset=data, processing_class=tokenizer(), method=method
        )
        trainer.train()
        method.consolidate(trainer.get_train_dataloader())


def trl_by_hand(model: nn.Module, tasks: Sequence[Any]) -> None:
    from trl import SFTConfig, SFTTrainer

    args = arguments(SFTConfig)
    trainer_by_hand(
        model,
        tasks,
        lambda model, data: SFTTrainer(
            model, args, train_dataset=data, processing_class=tokenizer()
        ),
    )


def batches() -> Sequence[Any]:
    tasks = (torch.tensor(data["input_ids"]).split(BATCH) for data in texts())
    return [[{"input_ids": x, "labels": x} for x in task] for task in tasks]


def with_lora(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def peft_without(model, tasks):
    lora = with_lora(model)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=LR)
    for batch in tasks[1]:
        lora(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peft_glued(model, tasks):
    from clext.integrations.peft import MergedPenalty

    method = clext.EWC(model)
    method.consolidate(tasks[0])
    lora = with_lora(model)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=LR)
    MergedPenalty(method).attach(optimizer)
    for batch in tasks[1]:
        lora(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peft_by_hand(model: nn.Module, tasks: Sequence[Any]) -> None:
    """The penalty on the merged weights by autograd: strength * sum of F * (s B A)^2."""
    from peft.tuners.lora import LoraLayer

    method = clext.EWC(model)
    method.consolidate(tasks[0])
    fisher = {name: entry.clone() for name, entry in method.importance.items()}
    lora = with_lora(model)
    layers = [
        (fisher[f"{name}.weight"], layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    optimizer = torch.optim.AdamW(lora.parameters(), lr=LR)
    for batch in tasks[1]:
        changes = [(f, layer.get_delta_weight("default")) for f, layer in layers]
        penalty = method.strength * sum((f * change.square()).sum() for f, change in changes)
        (lora(**batch).loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()


TEXTS = {
    "Transformers": Framework(
        "transformers",
        language_model,
        texts,
        transformers_without,
        transformers_glued,
        transformers_by_hand,
    ),
    "TRL": Framework("trl", language_model, texts, trl_without, trl_glued, trl_by_hand),
    "PEFT": Framework("peft", language_model, batches, peft_without, peft_glued, peft_by_hand),
}
