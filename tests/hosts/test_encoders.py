"""Encoders and decoders with attention masks, of which they ask whether these are needed, and sentence-transformers."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="needs Transformers: make test-integrations")
pytest.importorskip("accelerate", reason="needs Accelerate: make test-integrations")

import transformers
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rwalk import EWC, MAS, Consolidator, Kronecker
from rwalk.gradients import per_example_over
from rwalk.integrations.transformers import ConsolidationCallback, protect

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
VOCABULARY, LENGTH = 20, 8


def encoder(attention="sdpa"):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
        num_labels=3,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config).double()


def llama(attention):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).double()


def masked_batch(padding, places):
    ids, mask = torch.randint(1, VOCABULARY, (5, LENGTH)), torch.ones(5, LENGTH, dtype=torch.long)
    if padding == "some":
        mask[1, 5:], mask[3, 3:] = 0, 0
    if padding == "all":
        mask[:, 6:] = 0
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100) if places else torch.randint(3, (5,))
    return {"input_ids": ids, "labels": labels} | ({} if padding == "none" else {"attention_mask": mask})


@pytest.mark.filterwarnings("error:The examples are measured one at a time")
@pytest.mark.parametrize("padding", ["none", "no place", "some", "all"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [encoder, llama])
def test_examples_with_masks_are_measured_together(make, attention, padding):
    model, batch = make(attention), masked_batch(padding, make is llama)
    theta, want = dict(model.named_parameters()), {"true": 0.0, "norm": 0.0}
    for i in range(5):
        output = model.eval()(**{name: t[i : i + 1] for name, t in batch.items()})
        count = batch["attention_mask"][i : i + 1, :, None] if make is llama and "attention_mask" in batch else 1  # no padding
        for objective, score in (("true", output.loss), ("norm", (output.logits * count).square().sum())):
            grads = torch.autograd.grad(score, [*theta.values()], retain_graph=True)
            want[objective] += torch.cat([g.flatten() for g in grads]).square() / 5
    for objective, expected in want.items():
        loss = (lambda output, _: output.loss) if objective == "true" else None
        got = per_example_over(model, theta, [batch], loss=loss)(objective, torch.square)
        torch.testing.assert_close(
            torch.cat([g.flatten() for g in got]), expected, rtol=1e-9, atol=1e-12 * float(expected.max())
        )
    for rule in (
        EWC(labels="sample"),
        EWC(labels="output"),
        Kronecker(measure="data"),
        Kronecker(measure="data", labels="output"),
    ):
        memory = Consolidator(copy.deepcopy(model), rule)
        memory.estimate([batch])
        assert memory.anchor.point


@pytest.mark.parametrize(
    "rule", [EWC(labels="output"), Kronecker(measure="data", labels="output")], ids=lambda r: type(r).__name__
)
def test_embeddings_are_protected_by_a_reader_that_sees_the_mask(rule):
    batch = masked_batch("some", False)
    del batch["labels"]
    model = encoder().bert

    def mean(output, batch):
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)

    memory = protect(model, DataLoader([{k: t[i] for k, t in batch.items()} for i in range(5)], 3), rule, logits=mean)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.add_(0.1)
        model.encoder.layer[0].output.dense.weight.add_(0.1)
    assert memory.penalty() > 0
    with pytest.raises(ValueError, match="the same norm for every example"):
        protect(model, DataLoader([{k: t[i] for k, t in batch.items()} for i in range(5)], 3), MAS(), logits=mean)


def sentence_transformer(folder):
    """A tiny model of sentence-transformers, with a vocabulary of letters."""
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=LENGTH).save_pretrained(folder)
    encoder().bert.float().save_pretrained(folder)
    return package.SentenceTransformer(str(folder), device="cpu").double()


def unit(output):
    return F.normalize(output["sentence_embedding"], dim=1)


@pytest.mark.filterwarnings("error:The examples are measured one at a time")
def test_sentence_transformers_take_texts(tmp_path):
    model, texts = sentence_transformer(tmp_path), ["a b", "c d e f", "g", "a c e"]
    theta, found = dict(model.named_parameters()), []
    for data in ([texts], [(texts[:2], torch.zeros(2)), texts[2:]]):
        got = per_example_over(model, theta, data)("norm", torch.square)
        found.append(torch.cat([g.flatten() for g in got]))
    want = torch.zeros_like(found[0])
    for text in texts:
        z = model(getattr(model, "preprocess", model.tokenize)([text]))["sentence_embedding"]
        grads = torch.autograd.grad(z.square().sum(), [*theta.values()], allow_unused=True, materialize_grads=True)
        want += torch.cat([g.flatten() for g in grads]).square() / 4
    for one in found:
        torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-12 * float(want.max()))
    for rule in (EWC(labels="output"), Kronecker(measure="data", labels="output")):
        memory = Consolidator(copy.deepcopy(model), rule)
        memory.estimate([texts], logits=unit)
        assert memory.anchor.point
    with pytest.raises(ValueError, match="the same norm for every example"):
        Consolidator(model, MAS()).estimate([texts], logits=unit)


def test_columns_of_texts_are_measured_as_texts(tmp_path):
    """What SentenceTransformerTrainer trains on, such as `anchor` and `positive`, counts as all their texts together."""
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    model, columns = sentence_transformer(tmp_path), {"anchor": ["a b", "c d e f", "g", "a c e"], "positive": list("abcd")}
    callback = ConsolidationCallback(MAS(), 1.0)
    arguments = package.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    package.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=pytest.importorskip("datasets").Dataset.from_dict(columns),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[callback],
    ).train()
    other = Consolidator(model, MAS())
    other.estimate([[*columns["anchor"], *columns["positive"]]])
    want = {name: o for name, o in other.anchor.importance().items() if name in callback.memory.anchor.omega}
    assert want
    torch.testing.assert_close(callback.memory.anchor.importance(), want)
