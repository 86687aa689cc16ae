"""LoRA of PEFT is held by its product: tiny language models, in float64."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("peft", reason="needs PEFT: make test-integrations")
pytest.importorskip("transformers", reason="needs Transformers: make test-integrations")

import peft
import transformers

from cases import assert_same_state
from rwalk import Consolidator, Distillation, Kronecker
from rwalk.anchors.products import ProductFactor
from rwalk.gradients import adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # PEFT uses it
VOCABULARY, LENGTH = 30, 8


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH)
    return transformers.GPT2LMHeadModel(config)


def adapted(base=llama, targets=("q_proj", "v_proj", "down_proj"), **more):
    torch.manual_seed(2)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **more)
    return peft.get_peft_model(base(), settings).double()


def learning(model):
    return [p for p in model.parameters() if p.requires_grad]


def tokens(seed, count=4):
    torch.manual_seed(100 + seed)
    return torch.randint(1 + 10 * (seed % 3), 10 + 10 * (seed % 3), (count, LENGTH))


def loss_of(model, x):
    return F.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def train(model, optimizer, task, steps=11):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens(task + 3 * step)).backward()
        optimizer.step()


def attached(model, rule=None, lr=0.05, **more):
    optimizer = torch.optim.SGD(learning(model), lr=lr)
    return optimizer, Consolidator(model, rule or Kronecker(), 0.1, average="none", **more).attach(optimizer)


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def pairs(model, key="default"):
    return {f"{name}.lora_B.{key}.weight": f"{name}.lora_A.{key}.weight" for name in lora_layers(model)}


def test_all_of_lora_is_held_by_products_with_the_matrices_of_the_layers_as_wholes():
    model = adapted()
    optimizer, memory = attached(model, Kronecker(rank=None, share=1.0), lr=0.0)
    x = tokens(0)
    loss_of(model, x).backward()
    optimizer.step()
    memory.consolidate()
    assert {w: layer.arrangement.down for w, layer in memory.anchor.layers.items()} == pairs(model)
    assert not memory.anchor.omega
    assert memory.summary().figures["share held in layers"] == pytest.approx(1)
    seen = {}
    for name, module in lora_layers(model).items():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    loss = loss_of(model, x) * len(x)
    deltas = torch.autograd.grad(loss, [out for _, out in seen.values()])
    ratios = []
    for (name, (rows, _)), d in zip(seen.items(), deltas, strict=True):
        layer, rows, d = memory.anchor.layers[f"{name}.lora_B.default.weight"], rows.flatten(0, 1), d.flatten(0, 1)
        assert layer.arrangement.scale == 2.0
        rows = rows[d.any(1)]  # the last place of a sequence predicts nothing
        assert torch.allclose(layer.inputs.matrix()[0], rows.T @ rows / len(rows), rtol=1e-8, atol=1e-10)
        g = d.T @ d / len(x)
        ratios.append(float(g.trace() / layer.outputs.diagonal().sum()))
        assert torch.allclose(layer.outputs.matrix()[0] * ratios[-1], g, rtol=1e-8, atol=1e-10 * float(g.abs().max()))
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


@pytest.mark.parametrize(
    ("base", "more"),
    [
        (llama, {}),
        (llama, {"use_rslora": True, "lora_dropout": 0.2}),
        (gpt, {"targets": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_two_tasks_are_held_by_what_their_products_do(base, more):
    model = adapted(base, **more)
    optimizer, memory = attached(model)
    train(model, optimizer, 0)
    memory.consolidate()
    assert len(memory.anchor.layers) == len(pairs(model))
    assert all(isinstance(layer, ProductFactor) for layer in memory.anchor.layers.values())
    before = {name: m.get_delta_weight("default") for name, m in lora_layers(model).items()}
    train(model, optimizer, 1, 15)
    total = 0.0
    for name, module in lora_layers(model).items():
        layer = memory.anchor.layers[f"{name}.lora_B.default.weight"]
        d = (module.get_delta_weight("default") - before[name]).detach()
        d = d.T if base is gpt else d
        total += torch.trace(d.T @ layer.outputs.matrix()[0] @ d @ layer.inputs.matrix()[0])
    assert float(memory.penalty()) == pytest.approx(0.1 * float(total), rel=1e-9)
    assert total > 0
    memory.consolidate()
    assert {layer.tasks for layer in memory.anchor.layers.values()} == {2}


def test_what_earlier_tasks_need_is_kept_better_the_stronger_it_is_held():
    losses = []
    for strength in (0.0, 1e-3, 1.0, 1e6):
        model = adapted()
        optimizer, memory = attached(model, lr=0.5)
        memory.strength = strength
        train(model, optimizer, 0, 60)
        memory.consolidate()
        train(model, optimizer, 1, 60)
        assert all(torch.isfinite(p).all() for p in learning(model))
        with torch.no_grad():
            losses.append(sum(float(loss_of(model, tokens(3 * step))) for step in range(10)))
    assert losses[-1] < losses[-2] < losses[0]


def test_a_task_that_was_interrupted_goes_on_bit_for_bit(tmp_path):
    model = adapted()
    optimizer, memory = attached(model)
    train(model, optimizer, 0)
    memory.consolidate()
    train(model, optimizer, 1, 5)
    memory.save(tmp_path / "state")
    again = adapted()
    again.load_state_dict(model.state_dict())
    other = torch.optim.SGD(learning(again), lr=0.05)
    loaded = Consolidator(again, Kronecker(), 0.1, average="none")
    loaded.load(tmp_path / "state")
    loaded.attach(other)
    copied = copy.deepcopy((model, optimizer, memory))
    for one, its, held in ((model, optimizer, memory), (again, other, loaded), copied):
        train(one, its, 2, 17)
        held.consolidate()
    for one, held in ((again, loaded), (copied[0], copied[2])):
        assert_same_state(held, memory)
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), model.parameters(), strict=True))


def test_estimating_on_data_protects_what_the_base_model_does():
    model = adapted()
    memory = Consolidator(model, Kronecker(labels="sample"), 0.1)
    memory.estimate([(x, x) for x in (tokens(0), tokens(1))], logits=lambda out: out.logits)
    assert set(memory.anchor.layers) == set(pairs(model))
    assert float(memory.penalty()) == 0
    with torch.no_grad():
        for module in lora_layers(model).values():
            module.lora_B.default.weight.normal_()
    assert float(memory.penalty()) > 0


def test_an_adapter_for_each_task():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    model.double()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.05)
    memory = Consolidator(model, Kronecker(), 0.1, average="none").attach(optimizer)
    train(model, optimizer, 0)
    memory.consolidate()
    assert set(memory.anchor.layers) == set(pairs(model))
    model.set_adapter("other")
    train(model, optimizer, 1)
    memory.consolidate()
    assert set(memory.anchor.layers) == {*pairs(model), *pairs(model, "other")}
    assert all(isinstance(layer, ProductFactor) and layer.tasks == 1 for layer in memory.anchor.layers.values())
    assert not memory.anchor.omega


def test_dora_is_held_factor_by_factor():
    adapters.WARNED.clear()
    model = adapted(use_dora=True)
    with pytest.warns(UserWarning, match="do more than add the product"):
        optimizer, memory = attached(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 0)
        memory.consolidate()
    assert not any(isinstance(layer, ProductFactor) for layer in memory.anchor.layers.values())
    assert set(pairs(model).values()) <= set(memory.anchor.layers)


def test_with_gradient_checkpointing_and_inputs_that_require_gradients():
    plain, saving = adapted(), adapted()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    saving.enable_input_require_grads()
    memories = []
    for model in (plain, saving):
        model.train()
        optimizer, memory = attached(model)
        train(model, optimizer, 0, 3)
        memory.consolidate()
        memories.append(memory)
    for name, layer in memories[0].anchor.layers.items():
        other = memories[1].anchor.layers[name]
        assert torch.allclose(other.inputs.matrix(), layer.inputs.matrix(), rtol=1e-8, atol=1e-10)
        assert torch.allclose(other.outputs.matrix(), layer.outputs.matrix(), rtol=1e-8, atol=1e-10)


def whole_weights(model):
    return {n: (m.base_layer.weight + m.get_delta_weight("default")).detach().clone() for n, m in lora_layers(model).items()}


def moved_penalty(anchor, before, model):
    """What it costs that whole weights have moved, written out."""
    total = 0.0
    for name, now in whole_weights(model).items():
        layer, d = anchor.layers[f"{name}.lora_B.default.weight"], now - before[name]
        total += float(torch.trace(d.T @ layer.outputs.matrix()[0] @ d @ layer.inputs.matrix()[0]))
    return total


def test_adapters_that_are_merged_and_begin_anew_still_hold_the_whole_weights():
    model = adapted()
    optimizer, memory = attached(model)
    train(model, optimizer, 0)
    memory.consolidate()
    before = whole_weights(model)
    model.merge_adapter()
    assert float(memory.penalty()) == 0
    for module in lora_layers(model).values():
        module.reset_lora_parameters("default", True)
        module.merged_adapters.clear()
    assert float(memory.penalty()) == pytest.approx(0, abs=1e-20)
    train(model, optimizer, 1, 10)
    assert float(memory.penalty()) == pytest.approx(0.1 * moved_penalty(memory.anchor, before, model), rel=1e-6)
    memory.consolidate()
    assert {layer.tasks for layer in memory.anchor.layers.values()} == {2}


def test_an_anchor_is_adopted_by_new_adapters_of_the_merged_model():
    model = adapted()
    optimizer, memory = attached(model)
    train(model, optimizer, 0)
    memory.consolidate()
    before = whole_weights(model)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    again = peft.get_peft_model(model.merge_and_unload(), settings).double()
    optimizer, other = attached(again)
    other.adopt(memory.anchor)
    assert float(other.penalty()) == pytest.approx(0, abs=1e-20)
    train(again, optimizer, 1, 10)
    assert float(other.penalty()) == pytest.approx(0.1 * moved_penalty(other.anchor, before, again), rel=1e-6)


def test_old_answers_are_those_without_adapters_and_what_is_frozen_stays_frozen():
    model, ids = adapted(), tokens(0)
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "two"])
    for name, p in model.named_parameters():
        p.requires_grad_(".two." in name)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    Distillation(model)({"input_ids": ids}, model(input_ids=ids)).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
