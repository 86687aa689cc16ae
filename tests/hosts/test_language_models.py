"""Language models whose input and output embeddings are one weight."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="needs Transformers: make test-integrations")

import transformers

from rwalk import Consolidator, Kronecker

transformers.logging.set_verbosity_error()
VOCABULARY, LENGTH = 20, 8


def gpt():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=LENGTH,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), "transformer.wte"


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config), "bert.embeddings.word_embeddings"


def gemma():
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return transformers.GemmaForCausalLM(config), "model.embed_tokens"


@pytest.mark.parametrize("make", [gpt, bert, gemma])
def test_the_shared_weight_is_held_as_one_layer(make):
    """Against the inputs and gradients of both modules, as hooks of the test's own see them."""
    torch.manual_seed(1)
    model, path = make()
    model = model.double()
    embedding, head = model.get_submodule(path), model.get_output_embeddings()
    assert head.weight is embedding.weight
    seen = {}

    def remember(key):
        def hook(module, args, output):
            output.retain_grad()
            seen[key] = args[0].detach(), output

        return hook

    handles = [embedding.register_forward_hook(remember("embedding")), head.register_forward_hook(remember("head"))]
    for name, p in model.named_parameters():
        p.requires_grad_(p is embedding.weight or name.endswith("predictions.bias"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    memory = Consolidator(model, Kronecker(m=1, rank=None, share=1.0), average="none").attach(optimizer)
    x, y = torch.randint(1, VOCABULARY, (2, 5, LENGTH))
    F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    memory.consolidate()
    for handle in handles:
        handle.remove()
    (_, e), (h, z) = seen["embedding"], seen["head"]
    d, g = (t.grad.flatten(0, 1) * len(x) for t in (e, z))
    d = d * float(getattr(embedding, "embed_scale", 1.0))
    counts, outputs = torch.bincount(x.flatten(), minlength=VOCABULARY) / x.numel(), d.T @ d / len(x)
    hidden, squares = h.flatten(0, 1).T @ h.flatten(0, 1) / x.numel(), g.square().sum(0) / len(x)
    total = outputs.trace() + hidden.trace() * squares.sum()
    layer = memory.anchor.layers[f"{path}.weight"]
    assert f"{path}.weight" not in memory.anchor.omega
    assert set(memory.anchor.omega) == ({"cls.predictions.bias"} if make is bert else set())
    a = (counts * outputs.trace() + squares * hidden.trace()) / total
    assert torch.allclose(layer.inputs.diagonal()[0], a.double(), rtol=1e-6)
    held, truth = layer.outputs.matrix()[0], outputs + hidden * squares.sum()
    assert torch.allclose(held / held.trace(), truth / truth.trace(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("measure", ["training", "data"])
def test_a_vocabulary_grows_with_the_models_own_method(measure):
    torch.manual_seed(1)
    model, path = gpt()
    memory = Consolidator(model, Kronecker(measure=measure, m=1, rank=4), average="none")
    for more in (0, 3):
        if more:
            model.resize_token_embeddings(VOCABULARY + more)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        memory.attach(optimizer)
        x = torch.randint(1, VOCABULARY + more, (5, LENGTH))
        for _ in range(2):
            optimizer.zero_grad()
            model(x, labels=x).loss.backward()
            optimizer.step()
        memory.consolidate([(x, x)] if measure == "data" else None)
    layer = memory.anchor.layers[f"{path}.weight"]
    assert (layer.tasks, layer.inputs.size) == (2, VOCABULARY + 3)
    assert torch.isfinite(layer.outputs.values).all()
