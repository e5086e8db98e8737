"""Models of timm and Transformers, as they are used: fast, and equal to a loop over samples."""

from __future__ import annotations

import warnings

import pytest
import torch
from importance_models import CLASSES
from importance_oracle import assert_close, gradients_of, mean
from torch import nn

from clext.core.supervision import Supervision
from clext.importance import SlowImportanceWarning, fisher_information, output_sensitivity

WORDS = 40
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {"num_key_value_heads": 1}

TEXT = {
    "BERT": ("Bert", "ForSequenceClassification", {}),
    "RoBERTa": ("Roberta", "ForSequenceClassification", {}),
    "GPT-2": ("GPT2", "ForSequenceClassification", GPT2),
    "Llama": ("Llama", "ForSequenceClassification", LLAMA),
    "GPT-2, language": ("GPT2", "LMHeadModel", GPT2),
    "Llama, tied": ("Llama", "ForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "OPT": ("OPT", "ForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
}

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
IMAGES = {
    "vit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnetv2_18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_chs": 8},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 16,
        "window_size": 2,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (2, 2),
    },
}


def perturbed(model: nn.Module) -> nn.Module:
    """With weights that are not zero, as some are before training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.double().eval()


def check(model, batches, log_p):
    """`log_p`: of a batch of one sample."""
    params = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowImportanceWarning)
        got = fisher_information(model, params, batches)
        supervision = Supervision(model, loss=lambda _, batch: -log_p(batch))
        by_loss = fisher_information(model, params, batches, supervision=supervision)
    singles = [one for batch in batches for one in single(batch)]
    expected = mean([[g.square() for g in gradients_of(log_p(x).sum(), params)] for x in singles])
    # Where terms cancel (biases of keys), what is left is rounding.
    largest = max(float(entry.max()) for entry in expected)
    for found in (got, by_loss):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12 * largest)


def single(batch):
    """A batch for each sample."""
    if isinstance(batch, dict):
        count = len(batch["labels"])
        return [{k: v[n : n + 1] for k, v in batch.items()} for n in range(count)]
    return [tuple(entry[n : n + 1] for entry in batch) for n in range(len(batch[0]))]


@pytest.mark.parametrize("name", TEXT)
def test_text(name):
    transformers = pytest.importorskip("transformers")
    family, task, options = TEXT[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    model = perturbed(getattr(transformers, family + task)(config))
    draws = torch.Generator().manual_seed(1)
    batches = []
    for count, length in ((4, 8), (4, 8), (2, 6)):
        words = torch.randint(3, WORDS, (count, length), generator=draws)
        words[0, length - 2 :] = 0
        labels = torch.arange(count) % CLASSES
        if not task.endswith("Classification"):
            labels = words.masked_fill(words == 0, -100)
        batches.append(
            {"input_ids": words, "attention_mask": (words != 0).long(), "labels": labels}
        )

    def log_p(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"]
        if logits.dim() == 2:
            return logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        labels = labels[:, 1:]
        each = logits[:, :-1].log_softmax(2).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        return (each * (labels != -100)).sum(1)

    check(model, batches, log_p)


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name, num_classes=CLASSES, **IMAGES[name]))
    draws = torch.Generator().manual_seed(1)
    size = 16 if "img_size" in IMAGES[name] else 32
    x = torch.randn(5, 3, size, size, generator=draws, dtype=torch.float64)
    y = torch.arange(5) % CLASSES
    batches = list(zip(x.split(3), y.split(3), strict=True))

    def log_p(batch):
        x, y = batch
        return model(x).log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)

    check(model, batches, log_p)


def test_a_model_prepared_in_bfloat16():
    """Its `forward` is inside of an autocast, which measuring leaves out, and is put back."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one for the process
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    params = list(model.parameters())
    batches = [(torch.randn(8, 6), torch.arange(8) % CLASSES) for _ in range(2)]
    estimates = (fisher_information, output_sensitivity)
    expected = [estimate(model, params, batches) for estimate in estimates]
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    forward = prepared.forward
    before = prepared(batches[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowImportanceWarning)
        for estimate, values in zip(estimates, expected, strict=True):
            assert_close(estimate(prepared, params, batches), values, rtol=0)
    assert prepared.forward is forward
    assert torch.equal(prepared(batches[0][0]), before)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
