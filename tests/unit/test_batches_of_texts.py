"""Batches of texts for models that tokenise them, as those of sentence-transformers do."""

import copy

import pytest
import torch
from torch import nn

from dense import close, gradients_of
from rwalk import EWC, MAS, Consolidator, Kronecker

TEXTS = ["a cat", "a", "the cat sat", "on a mat here", "a cat"]


def features_of(texts):
    """A number for each word, padded with 0 to the longest."""
    rows = [[1 + sum(map(ord, word)) % 8 for word in text.split()] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "modality": "text"}


class Embedder(nn.Module):
    """The duck type: tokenises, takes one mapping, adds to it and returns it."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def tokenize(self, texts):
        return features_of([t["text"] if isinstance(t, dict) else t for t in texts])

    def forward(self, features):
        mask = features["attention_mask"].unsqueeze(-1)
        h = self.words(features["input_ids"]).sin()
        features["token_embeddings"] = h
        features["sentence_embedding"] = self.head((h if mask.all() else h * mask).sum(1) / mask.sum(1))
        return features


class Annotated(Embedder):
    """Says by its annotation that it takes a mapping; has the newer method, too."""

    def tokenize(self, texts):
        raise AssertionError("deprecated")

    def preprocess(self, inputs):
        return Embedder.tokenize(self, inputs)

    def forward(self, input: dict[str, torch.Tensor], **kwargs):
        return super().forward(input)


class Keywords(Embedder):
    """Takes features by their names."""

    def forward(self, input_ids, attention_mask, modality="text"):
        return super().forward({"input_ids": input_ids, "attention_mask": attention_mask})


MODELS = [Embedder, Annotated, Keywords]


def by_hand(model):
    """The same from a mapping of features, one example at a time."""
    totals, features = [torch.zeros_like(p) for p in model.parameters()], features_of(TEXTS)
    for i in range(len(TEXTS)):
        one = {key: value[i : i + 1] for key, value in features.items() if key != "modality"}
        z = Embedder.forward(model, one)["sentence_embedding"]
        for total, g in zip(totals, torch.autograd.grad(z.square().sum(), list(model.parameters())), strict=True):
            total += g.abs() / len(TEXTS)
    return totals


def batches(kind, model):
    if kind == "texts":
        return [TEXTS[:3], tuple(TEXTS[3:])]
    if kind == "pairs":
        return [(TEXTS[:3], torch.zeros(3)), [tuple(TEXTS[3:]), [0, 1]]]
    if kind == "mappings":
        return [[{"text": t} for t in TEXTS]]
    if kind == "features and labels":
        return [(features_of(TEXTS), torch.zeros(5))]
    return [features_of(TEXTS)]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("kind", ["texts", "pairs", "mappings", "features", "features and labels"])
def test_texts_are_tokenised_and_given_as_the_model_takes_them(make, kind, engine):
    model = make()
    close(gradients_of(model, batches(kind, model))("norm", torch.abs), by_hand(model))


@pytest.mark.parametrize(
    "rule", [EWC(labels="output"), Kronecker(measure="data", labels="output"), MAS()], ids=lambda r: type(r).__name__
)
def test_rules_take_texts(rule):
    penalties = []
    model = Embedder()
    for data in ([TEXTS], [((features_of(TEXTS),), torch.zeros(5))]):
        memory = Consolidator(copy.deepcopy(model), rule)
        torch.manual_seed(0)
        memory.estimate(data)
        with torch.no_grad():
            memory.model.head.weight.add_(1)
        penalties.append(memory.penalty())
    assert penalties[0] == penalties[1] > 0


def test_readers_see_the_features():
    model = Embedder()

    def mean(output, batch):
        return output["token_embeddings"].sum(1) / batch["attention_mask"].sum(1, keepdim=True)

    first = gradients_of(model, [TEXTS], logits=mean)("norm", torch.abs)
    assert first[0].any()
    assert not first[1].any()  # the head has no part in it


def test_what_cannot_be_read_is_refused():
    with pytest.raises(TypeError, match=r"yield texts, and a `Linear` has no method `tokenize` or `preprocess`.*`collate_fn`"):
        Consolidator(nn.Linear(2, 2), EWC(labels="output")).estimate([TEXTS])
    with pytest.raises(TypeError, match=r"single texts, of type `str`\. Let each batch be a list of texts"):
        Consolidator(Embedder(), EWC(labels="output")).estimate(TEXTS)
