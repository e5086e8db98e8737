"""Texts through Hugging Face `datasets`: token ids, tasks of them, and a run that learns."""

import json

import pytest
import torch
from torch import nn

import clext
from clext.data.text import text_dataset

datasets = pytest.importorskip("datasets")

WORDS = (("orbit", "rocket"), ("goal", "referee"), ("bank", "shares"), ("software", "browser"))


@pytest.fixture
def news(tmp_path):
    """Files as those of AG News: a column "text", and "label" from 0 to 3."""
    files = {}
    for part, count in (("train", 80), ("test", 20)):
        rows = [
            {"text": f"The {WORDS[k % 4][k // 4 % 2].title()}, again! No. {k}", "label": k % 4}
            for k in range(count)
        ]
        files[part] = str(tmp_path / f"{part}.json")
        (tmp_path / f"{part}.json").write_text("\n".join(map(json.dumps, rows)))
    return datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))


def bag(vocabulary: int = 1000) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(vocabulary, 16, padding_idx=0), nn.Linear(16, 4))


class TestTokens:
    def test_words_have_the_same_id_everywhere_and_padding_none(self, news):
        found = text_dataset(news, length=6, vocabulary=1000, name="AG News")
        assert (found.name, found.num_classes) == ("AG News", 4)
        assert found.train.inputs.dtype == torch.int64
        assert found.train.inputs.shape == (80, 6)
        assert found.train.labels.tolist() == [k % 4 for k in range(80)]
        # "the", "rocket" or another, "again", "no", and numbers of two digits.
        words = (found.train.inputs > 0).sum(dim=1)
        assert words.tolist() == [4] * 10 + [5] * 70
        assert found.train.inputs.max() < 1000
        assert len(found.train.inputs[:, 0].unique()) == 1
        assert len(found.train.inputs[:, 1].unique()) == 8
        assert found.test.inputs.equal(found.train.inputs[:20])

    def test_what_is_longer_is_cut(self, news):
        long, short = (text_dataset(news, length=n).train.inputs for n in (6, 2))
        assert short.equal(long[:, :2])

    def test_a_tokenizer_of_transformers(self, news):
        transformers = pytest.importorskip("transformers")
        tokenizers = pytest.importorskip("tokenizers")
        names = ["[PAD]", "[UNK]", "the", *(word for pair in WORDS for word in pair)]
        inner = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({name: k for k, name in enumerate(names)}, "[UNK]")
        )
        inner.normalizer = tokenizers.normalizers.Lowercase()
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
        )
        ids = text_dataset(news, length=9, tokenizer=tokenizer).train.inputs
        # The comma, "again", "!", "No", "." and the number are not known.
        assert ids[0].tolist() == [2, 3, 1, 1, 1, 1, 1, 1, 0]
        assert ids[1].tolist() == [2, 5, 1, 1, 1, 1, 1, 1, 0]

    def test_other_columns_and_parts(self, news):
        other = datasets.DatasetDict(
            {"a": news["train"].rename_columns({"text": "title", "label": "topic"})}
        )
        found = text_dataset(other, text="title", label="topic", train="a", test="a")
        assert found.test.inputs.equal(text_dataset(news).train.inputs)

    @pytest.mark.parametrize("wrong", ["sport", -1])
    def test_labels_that_are_no_classes(self, news, wrong):
        data = {"train": {"text": ["a b"], "label": [wrong]}, "test": news["test"]}
        with pytest.raises(ValueError, match=r"'label' of part 'train' must .*class_encode_column"):
            text_dataset(data)


def test_tasks_of_topics_are_learned(news):
    data = text_dataset(news, length=8, vocabulary=1000)
    scenario = clext.Scenario.split(data, tasks=2, incremental="task")
    result = clext.train(
        "ewc", scenario=scenario, model=bag(), lr=0.05, batch_size=8, epochs=5, progress=False
    )
    assert result.accuracy[1].tolist() == [1.0, 1.0]
    assert result.config["data"]["features"] == 8


def test_a_model_of_numbers_is_told_what_tokens_need(news):
    scenario = clext.Scenario.split(text_dataset(news), tasks=2)
    with pytest.raises(ValueError, match="begin the model with nn.EmbeddingBag if they are tokens"):
        clext.train("ewc", scenario=scenario, progress=False)
