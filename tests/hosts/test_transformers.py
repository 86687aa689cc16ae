"""Trainer with a memory gives what a loop written out with a `Consolidator` gives, also resumed, killed and on two ranks."""

import copy
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="needs Transformers: make test-integrations")
pytest.importorskip("accelerate", reason="needs Accelerate: make test-integrations")

import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import hosts
from hosts import numbers
from rwalk import EWC, L2, MAS, SI, Consolidator, RWalk
from rwalk._parameters import bare
from rwalk.consolidation.hooks import innermost
from rwalk.integrations.transformers import FILE, ConsolidationCallback, protect

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # PEFT and TRL use it
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
HERE = Path(__file__).parent
VOCABULARY, LENGTH = 20, 8
RULES = {"rwalk": RWalk(delta_t=3), "recipe": None, "ewc": EWC()}


def bert(dropout=0.0, kind=BertForSequenceClassification, labels=3):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    return kind(config).double()


def gpt(dropout=0.0):
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config).double()


def sentences(task, count=24):
    """Examples whose label says which of three tokens, others for each task, is the most frequent."""
    generator = torch.Generator().manual_seed(task)
    x = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    y = ((x + task) % 3).mode(1).values
    return [{"input_ids": a, "labels": b} for a, b in zip(x, y, strict=True)]


def lines(task, count=12):
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences(task, count)]


USUAL = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 0.01,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "dataloader_pin_memory": False,
}


def arguments(folder, **options):
    return TrainingArguments(str(folder), **USUAL | options)


def mean_over_the_step(outputs, labels, num_items_in_batch):
    """A classifier's loss; Transformers' own, of BERT at least, is not divided by the number of micro-batches."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def trainer(folder, model, data, callbacks, loss=None, **options):
    arranged = arguments(folder, **options)
    return Trainer(model=model, args=arranged, train_dataset=data, callbacks=callbacks, compute_loss_func=loss)


def batches(data, size=4):
    return [{key: torch.stack([row[key] for row in data[i : i + size]]) for key in data[0]} for i in range(0, len(data), size)]


EXACT = {"rtol": 0, "atol": 0}


def same(one, two, rtol=1e-9, atol=1e-12):
    """Demand equal weights, anchors and state."""
    tolerance = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(dict(one.model.named_parameters()), dict(two.model.named_parameters()), **tolerance)
    a, b = one.state_dict(), two.state_dict()
    for key in ("anchor", "tail", "state"):
        torch.testing.assert_close(numbers(a[key]), numbers(b[key]), **tolerance)
    assert [a[key] for key in ("tasks", "steps", "rule")] == [b[key] for key in ("tasks", "steps", "rule")]


def classified(model, batch):
    return F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def by_hand(model, tasks, memory, accumulate=1, clip=1.0, epochs=2, lr=0.01, loss=classified, kind=torch.optim.AdamW):
    """What Trainer does with its defaults, in the order of the data: AdamW, a rate that falls to zero, clipping."""
    for data in tasks:
        optimizer = kind(model.parameters(), lr=lr, weight_decay=0.0)
        memory.detach()
        memory.attach(optimizer)
        parts = batches(data)
        groups = [parts[i : i + accumulate] for i in range(0, len(parts), accumulate)]
        total = epochs * len(groups)
        for step in range(total):
            optimizer.param_groups[0]["lr"] = lr * (total - step) / total
            optimizer.zero_grad()
            group = groups[step % len(groups)]
            for batch in group:
                model.train()
                (loss(model, batch) / len(group)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        memory.consolidate(**({"data": parts} if memory.rule.measures == "data" else {}))
    return memory


@pytest.mark.parametrize("rule", [RWalk(delta_t=3), None, SI(), EWC(), MAS()], ids=str)
def test_a_trainer_for_each_task_gives_what_a_loop_by_hand_gives(tmp_path, rule):
    model, other = bert(), bert()
    callback = ConsolidationCallback(rule, strength=0.5)
    tasks = [sentences(0), sentences(1)]
    options = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3, "train_sampling_strategy": "sequential"}
    for data in tasks:
        trainer(tmp_path, model, data, [callback], mean_over_the_step, **options).train()
    assert callback.memory.model is model
    same(callback.memory, by_hand(other, tasks, Consolidator(other, rule, strength=0.5), accumulate=3, clip=0.3))
    assert callback.memory.tasks == 2


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def two_tasks(folder, rule, kill=None, dropout=0.1, **options):
    """Return the memory after two tasks, which go on from checkpoints that are there."""
    model = bert(dropout)
    callback = ConsolidationCallback(RULES[rule], strength=0.5)
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
    for task in (0, 1):
        out = folder / str(task)
        callbacks = [callback, *([Kill(kill)] if kill and task else [])]
        one = trainer(out, model, sentences(task, 32), callbacks, mean_over_the_step, **settings | options)
        one.train(resume_from_checkpoint=get_last_checkpoint(out) if out.is_dir() else None)
    return callback.memory


HALVES = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "ddp_backend": "gloo", "dropout": 0.0}


def saved_tasks(folder, rules, *kill):
    """Two tasks under rules with commas between; `kill` is the step of the second at which the process kills itself."""
    for rule in rules.split(","):
        memory = two_tasks(Path(folder) / rule, rule, *map(int, kill), **(HALVES if "RANK" in os.environ else {}))
        if os.environ.get("RANK", "0") == "0":
            memory.save(Path(folder) / rule / "end.safetensors")
            torch.save(bare(memory.model).state_dict(), Path(folder) / rule / "end.pt")


@pytest.fixture(scope="module")
def elsewhere():
    """A function that calls one of this file in another process, or in two."""
    with hosts.forks("test_transformers") as run:
        yield run


def end_of(folder, memory):
    """Return a memory like `memory` as another process left it."""
    other = Consolidator(copy.deepcopy(memory.model), memory.rule, memory.strength, average=memory.average, pull=memory.pull)
    other.model.load_state_dict(torch.load(folder / "end.pt"))
    other.load(folder / "end.safetensors")
    return other


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, elsewhere):
    killed = elsewhere("saved_tasks", tmp_path / "killed", "rwalk", 5)
    assert killed["statuses"] == [-signal.SIGKILL], killed["stderr"]
    left = sorted(path.name for path in (tmp_path / "killed/rwalk/1").iterdir())
    assert left == ["checkpoint-2", "checkpoint-4"]
    again = elsewhere("saved_tasks", tmp_path / "killed", "rwalk")
    assert again["statuses"] == [0], again["stderr"]
    whole = two_tasks(tmp_path / "whole", "rwalk")
    same(end_of(tmp_path / "killed/rwalk", whole), whole, **EXACT)


def test_two_ranks_give_what_one_gives(tmp_path, elsewhere):
    two = elsewhere("saved_tasks", tmp_path / "two", "rwalk,ewc", ranks=2)
    assert two["statuses"] == [0, 0], two["stderr"]
    for rule in ("rwalk", "ewc"):
        one = two_tasks(tmp_path / "one" / rule, rule, dropout=0.0, train_sampling_strategy="sequential")
        same(end_of(tmp_path / "two" / rule, one), one)


@pytest.mark.parametrize("rule", ["rwalk", "recipe", "ewc"])
def test_a_new_callback_goes_on_from_a_checkpoint_wherever_it_lies(tmp_path, rule):
    whole = two_tasks(tmp_path / "here", rule)
    model = bert(0.1)
    callback = ConsolidationCallback(RULES[rule], strength=0.5)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
    again = trainer(tmp_path / "there", model, sentences(1, 32), [callback], mean_over_the_step, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "here/1/checkpoint-4"))
    same(callback.memory, whole, **EXACT)


def test_each_train_of_one_trainer_is_a_task(tmp_path):
    model, other = bert(), bert()
    callback = ConsolidationCallback(RWalk(), strength=0.5)
    one = trainer(tmp_path, model, sentences(0), [callback], train_sampling_strategy="sequential", num_train_epochs=1)
    for _ in range(2):
        one.train()
        assert not innermost(one.optimizer)._optimizer_step_pre_hooks
        one.optimizer = None  # Trainer would go on with the moments of the task before
    same(callback.memory, by_hand(other, [sentences(0)] * 2, Consolidator(other, RWalk(), strength=0.5), epochs=1))


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_task_is_not_over(tmp_path):
    model = bert(0.1)
    callback = ConsolidationCallback(RWalk(delta_t=3), strength=0.5)
    options = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "a", model, sentences(0), [callback, Fail()], **options).train()
    assert callback.memory.tasks == 0
    assert callback.memory.state_dict()["steps"] == 3
    trainer(tmp_path / "a", model, sentences(0), [callback], **options).train(resume_from_checkpoint=True)
    whole = ConsolidationCallback(RWalk(delta_t=3), strength=0.5)
    trainer(tmp_path / "b", bert(0.1), sentences(0), [whole], **options).train()
    same(callback.memory, whole.memory, **EXACT)


class Worsen(TrainerCallback):
    """Makes the evaluation of the fourth step the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - 4)


@pytest.mark.parametrize("rule", [RWalk(delta_t=3), None, EWC()], ids=str)
@pytest.mark.parametrize("only", [False, True], ids=["", "save_only_model"])
def test_with_the_best_model_a_task_is_what_led_to_it(tmp_path, rule, only):
    best, short = ConsolidationCallback(rule, strength=0.5), ConsolidationCallback(rule, strength=0.5)
    options = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    watch = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_model": only}
    data = sentences(0)
    first = Trainer(
        model=bert(),
        args=arguments(tmp_path, load_best_model_at_end=True, **watch, **options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[best, Worsen()],
    )
    first.train()
    assert first.state.best_model_checkpoint.endswith("checkpoint-4")
    trainer(tmp_path, bert(), data, [short], max_steps=4, **options).train()
    same(best.memory, short.memory)
    if rule is not None:  # averages are the model otherwise
        point = best.memory.anchor.point
        assert all(torch.equal(point[name], p) for name, p in first.model.named_parameters())


def test_figures_reach_trackers_and_history_and_spare_the_console(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = bert()
    callback = ConsolidationCallback(RWalk(), strength=0.5)
    for task in (0, 1):
        one = trainer(
            tmp_path, model, sentences(task), [callback], logging_strategy="steps", logging_steps=3, report_to="tensorboard"
        )
        one.train()
    assert sum(type(each).__name__ == "_Figures" for each in one.callback_handler.callbacks) == 1
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    drift, name = board.Scalars("train/memory/drift/classifier"), "memory/drift/classifier"
    history = [entry for entry in one.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [3, 6, 9, 12]
    assert [event.value for event in drift[-4:]] == pytest.approx([entry[name] for entry in history])
    assert history[-1]["memory/penalty"] > history[0]["memory/penalty"] > 0
    assert history[0]["memory/penalty_over_loss"] == pytest.approx(history[0]["memory/penalty"] / history[0]["loss"])
    shown = capsys.readouterr().out
    assert shown.count("memory/penalty'") == 8
    assert "drift" not in shown


def test_a_checkpoint_without_a_memory_is_refused(tmp_path):
    model, callback = bert(), ConsolidationCallback(RWalk())
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, model, sentences(0), [callback], save_only_model=True, **options).train()
    assert not list(tmp_path.rglob(FILE))
    trainer(tmp_path / "plain", model, sentences(0), [], **options).train()
    before = Consolidator(copy.deepcopy(model), RWalk())
    before.load_state_dict(callback.memory.state_dict())
    with pytest.raises(FileNotFoundError, match=r"without a `memory.safetensors`.* Remove that folder"):
        trainer(tmp_path / "plain", model, sentences(0), [callback], **options).train(resume_from_checkpoint=True)
    assert not callback.memory.state_dict()["steps"]
    before.model.load_state_dict(model.state_dict())  # Trainer has loaded its weights by then
    same(callback.memory, before, **EXACT)


def dense(model, examples, score):
    """The mean of squared gradients, example by example."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    for row in examples:
        model.zero_grad()
        score(model, {key: value.unsqueeze(0) for key, value in row.items()}).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad**2 / len(examples)
    model.zero_grad()
    return total


def tokens(model, row, reduction="mean"):
    """The negative log-likelihood of a line's tokens, each given those before it."""
    logits = model(input_ids=row["input_ids"]).logits
    return F.cross_entropy(logits[0, :-1], row["input_ids"][0, 1:], reduction=reduction)


def span(model, row):
    output = model(**row)
    return (
        F.cross_entropy(output.start_logits, row["start_positions"]) + F.cross_entropy(output.end_logits, row["end_positions"])
    ) / 2


FLOAT32 = {"rtol": 1e-4, "atol": 1e-9}  # language models compute their loss in float32


def test_a_language_models_importance_is_that_of_its_own_loss(tmp_path):
    model = gpt()
    callback = ConsolidationCallback(EWC(labels="true"), strength=0.5)
    trainer(tmp_path, model, lines(0), [callback]).train()
    truth = dense(model, lines(0), tokens)
    torch.testing.assert_close(callback.memory.anchor.importance(), truth, **FLOAT32)
    masked = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in lines(0)]  # goes one by one
    torch.testing.assert_close(protect(model, masked, EWC(labels="true")).anchor.importance(), truth, **FLOAT32)


def test_labels_of_tokens_are_drawn_where_the_models_own_loss_has_labels():
    """Against the sum over places and tokens, as scores of different places are independent; within five standard errors."""
    model, count = gpt().eval(), 400
    row = lines(0, 1)[0]
    labels = torch.where(torch.arange(LENGTH) < 5, -100, row["input_ids"])  # a label counts one place before its own
    memory = protect(model, [{"input_ids": row["input_ids"], "labels": labels}] * count, EWC(labels="sample"))
    score = model(input_ids=row["input_ids"][None]).logits[0, 4:-1].log_softmax(-1)
    theta, total = dict(model.named_parameters()), dict.fromkeys(memory.anchor.importance(), 0)
    for place in score:
        for value in place:
            grads = torch.autograd.grad(value, list(theta.values()), retain_graph=True)
            for name, g in zip(theta, grads, strict=True):
                total[name] = total[name] + value.detach().exp() * g**2
    got, want = (torch.cat([t[name].flatten() for name in theta]) for t in (memory.anchor.importance(), total))
    assert abs(got.sum() / want.sum() - 1) < 5 * (2 / count) ** 0.5
    assert ((got > 0) == (want > 1e-30)).double().mean() > 0.9


def test_a_loss_of_ones_own_takes_its_place(tmp_path):
    model = gpt()

    def summed(output, labels):
        return F.cross_entropy(output.logits[0, :-1], labels[0, 1:], reduction="sum")

    callback = ConsolidationCallback(EWC(labels="true"), loss=summed)
    trainer(tmp_path, model, lines(0), [callback]).train()
    truth = dense(model, lines(0), lambda m, row: tokens(m, row, "sum"))
    torch.testing.assert_close(callback.memory.anchor.importance(), truth, rtol=1e-9, atol=1e-14)


def test_labels_of_other_names_and_outputs_of_other_names(tmp_path):
    model = bert(kind=BertForQuestionAnswering, labels=2)
    data = [
        {"input_ids": row["input_ids"], "start_positions": row["labels"], "end_positions": row["labels"] + 3}
        for row in sentences(0)
    ]
    first = ConsolidationCallback(EWC(labels="true"))
    trainer(tmp_path, model, data, [first]).train()
    torch.testing.assert_close(first.memory.anchor.importance(), dense(model, data, span), rtol=1e-9, atol=1e-14)
    second = ConsolidationCallback(EWC(samples=3), logits=lambda output: output.start_logits)
    warnings.filterwarnings("ignore", "Another memory has learned")  # what this one is for
    trainer(tmp_path, model, data, [second], num_train_epochs=1, train_sampling_strategy="sequential").train()

    truth = dict.fromkeys(second.memory.anchor.importance(), 0)
    for label in range(LENGTH):
        for row in data[:3]:
            model.zero_grad()
            score = F.log_softmax(model(input_ids=row["input_ids"].unsqueeze(0)).start_logits, 1)[0, label]
            score.backward()
            for name, p in model.named_parameters():
                truth[name] = (
                    truth[name] + score.detach().exp() * (p.grad**2 if p.grad is not None else torch.zeros_like(p)) / 3
                )
    torch.testing.assert_close(second.memory.anchor.importance(), truth, rtol=1e-9, atol=1e-14)


def test_what_cannot_be_measured_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match='Use `labels="sample"`'):
        protect(gpt(), lines(0), EWC())
    with pytest.raises(ValueError, match="without the model's own loss"):
        protect(gpt(), [{"input_ids": row["input_ids"]} for row in lines(0)], EWC(labels="true"))
    with pytest.raises(RuntimeError, match="measures during training"):
        protect(bert(), sentences(0), RWalk())
    with pytest.raises(ValueError, match="all frozen"):
        protect(bert().requires_grad_(False), sentences(0), EWC())
    with pytest.raises(ValueError, match="needs data"):
        protect(bert(), None, MAS())


def test_a_pretrained_model_is_held_while_it_is_fine_tuned(tmp_path):
    model, other = bert(), bert()
    data = [row | {"text": "left out", "ragged": [1] * i} for i, row in enumerate(sentences(0))]
    memory = protect(model, data, EWC(), strength=5, batch_size=5)
    by_loader = protect(bert(), torch.utils.data.DataLoader(sentences(0), batch_size=7), EWC(), strength=5)
    same(memory, by_loader)
    expected = Consolidator(other, EWC(), strength=5)
    expected.estimate(batches(sentences(0)))
    trainer(tmp_path, model, sentences(1), [ConsolidationCallback(memory)], train_sampling_strategy="sequential").train()
    same(memory, by_hand(other, [sentences(1)], expected))
    assert protect(bert(), None, L2()).tasks == 1


def in_fp16(one, scale):
    """Arrange what Accelerate arranges for fp16 on a GPU; on a CPU it leaves half precision out without a word."""
    one.accelerator.scaler, one.accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_to_full(tmp_path, precision):
    full, mixed = ConsolidationCallback(RWalk(), strength=0.5), ConsolidationCallback(RWalk(), strength=0.5)
    models = [bert().float(), bert().float()]
    for task in (0, 1):
        options = {"train_sampling_strategy": "sequential", "learning_rate": 1e-3}
        trainer(tmp_path, models[0], sentences(task), [full], **options).train()
        last = trainer(tmp_path, models[1], sentences(task), [mixed], **options, **{precision: True})
        if precision == "fp16":
            in_fp16(last, 2.0**10)
        last.train()
    a, b = (torch.cat([o.flatten() for o in callback.memory.anchor.importance().values()]) for callback in (full, mixed))
    assert b.dtype == torch.float32
    assert 0 < float((a - b).norm() / a.norm()) < 0.05


class Count(TrainerCallback):
    """Notes after each step the loss scale, and how many steps the memory has counted."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.seen.append((optimizer.scaler.get_scale(), self.callback.memory.state_dict()["steps"]))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_a_loss_scaler_leaves_out_are_none(tmp_path, optim):
    callback = ConsolidationCallback(RWalk(), strength=0.5)
    count = Count(callback)
    one = trainer(tmp_path, bert().float(), sentences(0), [callback, count], fp16=True, optim=optim)
    in_fp16(one, 2.0**26)
    one.train()
    scales, steps = zip(*count.seen, strict=True)
    left_out = sum(scale < 2.0**26 / 2**i for i, scale in enumerate(scales))
    assert 0 < left_out < len(scales) == 12
    assert scales[left_out:] == (2.0**26 / 2**left_out,) * (12 - left_out)
    assert steps == (0,) * left_out + tuple(range(1, 13 - left_out))


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "XLA"])
def test_engines_that_hide_gradients_are_refused(tmp_path, monkeypatch, engine):
    callback = ConsolidationCallback(RWalk())

    class Pretend(TrainerCallback):
        def on_train_begin(self, *_, **__):
            monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType[engine])

    with pytest.raises(RuntimeError, match=f"Trainer under {engine}, .* Train under"):
        trainer(tmp_path, bert(), sentences(0), [Pretend(), callback]).train()
    with pytest.raises(RuntimeError, match="before training has begun"):
        _ = callback.memory


def test_checkpoints_that_callbacks_do_not_see_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="enable_jit_checkpoint"):
        trainer(tmp_path, bert(), sentences(0), [ConsolidationCallback()], enable_jit_checkpoint=True).train()


def test_another_model_is_refused(tmp_path):
    callback = ConsolidationCallback(RWalk())
    trainer(tmp_path, bert(), sentences(0), [callback], num_train_epochs=1).train()
    with pytest.raises(ValueError, match="another model"):
        trainer(tmp_path, bert(), sentences(1), [callback]).train()


def adapted(model):
    peft = pytest.importorskip("peft", reason="needs PEFT: make test-integrations")
    torch.manual_seed(2)
    kinds = {"GPT2LMHeadModel": ("CAUSAL_LM", "c_attn"), "BertForSequenceClassification": ("SEQ_CLS", "query")}
    task, target = kinds[type(model).__name__]
    settings = peft.LoraConfig(r=2, target_modules=[target], task_type=task, fan_in_fan_out=target == "c_attn")
    return peft.get_peft_model(model, settings).double()


def test_under_peft_the_adapters_are_protected_and_a_killed_task_goes_on(tmp_path):
    runs = []
    for name in ("whole", "again"):
        model = adapted(gpt())
        memory = protect(model, lines(0), EWC(labels="true", samples=5), strength=5)
        assert set(memory.anchor.importance()) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in memory.anchor.importance())
        assert "protects: 128 of 2,112 parameters" in str(memory.summary())
        held = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
        options = {"save_strategy": "steps", "save_steps": 2}
        one = trainer(tmp_path / name, model, lines(1), [ConsolidationCallback(memory)], **options)
        one.train(resume_from_checkpoint=None if name == "whole" else str(tmp_path / "whole/checkpoint-4"))
        assert all(torch.equal(p, held[name]) for name, p in model.named_parameters() if name in held)
        runs.append(memory)
    same(*runs, **EXACT)
    assert runs[0].tasks == 2


def test_adapters_that_come_after_protection_are_refused_until_they_are_merged(tmp_path):
    model = gpt()
    memory = protect(model, lines(0), EWC(labels="true"), strength=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with_adapters = adapted(model)
    with pytest.raises(ValueError, match="Call `protect` after `get_peft_model`"):
        trainer(tmp_path, with_adapters, lines(1), [ConsolidationCallback(memory)]).train()
    trainer(tmp_path, with_adapters, lines(1), []).train()
    merged = with_adapters.merge_and_unload()
    moved = sum((memory.anchor.importance()[n] * (p - before[n]) ** 2).sum() for n, p in merged.named_parameters())
    assert float(memory.penalty()) == pytest.approx(5 * float(moved)) != 0
    trainer(tmp_path, merged.requires_grad_(True), lines(1), [ConsolidationCallback(memory)]).train()
    assert memory.tasks == 2


def test_an_anchor_of_the_base_model_is_adopted_under_pefts_names():
    base = protect(bert(), sentences(0), EWC()).anchor
    model = adapted(bert())
    memory = Consolidator(model, EWC())

    def renamed(name):
        place = name.replace("classifier.", "classifier.modules_to_save.default.").replace("query.", "query.base_layer.")
        return f"base_model.model.{place}"

    match = memory.adopt(base, rename=renamed)
    assert len(match.same) == len(base)
    head = "base_model.model.classifier.modules_to_save.default.weight"
    assert dict(model.named_parameters())[head].requires_grad
    assert torch.equal(memory.anchor.importance()[head], base.omega["classifier.weight"])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def over_tokens(model, batch):
    """A language model's loss; TRL's own is divided by all tokens, the first of each line included."""
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_trls_sft_trainer_takes_the_same_callback(tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: make test-integrations")
    import datasets

    class OverTokens(trl.SFTTrainer):
        def compute_loss(self, model, inputs, **_):
            return over_tokens(model, inputs)

    datasets.disable_progress_bars()
    model, other = gpt(), gpt()
    callback = ConsolidationCallback(SI(), strength=0.5)
    tasks = []
    for task in (0, 1):
        texts = [{"text": " ".join(f"w{int(t) % 17}" for t in row["input_ids"][:7])} for row in sentences(task)]
        more = {"max_length": LENGTH, "train_sampling_strategy": "sequential", "bf16": False, "optim": "sgd"}
        one = OverTokens(
            model=model,
            args=trl.SFTConfig(str(tmp_path), **USUAL | more),
            train_dataset=datasets.Dataset.from_list(texts),
            processing_class=tokenizer(),
            callbacks=[callback],
        )
        one.train()
        tasks.append([{key: torch.tensor(row[key]) for key in ("input_ids", "labels")} for row in one.train_dataset])
    memory = Consolidator(other, SI(), strength=0.5)
    same(callback.memory, by_hand(other, tasks, memory, loss=over_tokens, kind=torch.optim.SGD))


DATA = Path(os.environ.get("RWALK_DATA") or HERE.parents[2] / "shared" / "data")


def table(name, split="train"):
    parquet = pytest.importorskip("pyarrow.parquet")
    if not (DATA / name).is_dir():
        pytest.skip(f"no folder {name} in RWALK_DATA")
    return parquet.read_table(DATA / name / f"{split}.parquet").to_pylist()


def characters(domain, count=160):
    text = "".join(row["text"] for row in table("lm_domains") if row["domain"] == domain)[: 64 * count]
    rows = torch.tensor([min(ord(letter), 127) for letter in text]).view(-1, 64)
    return [{"input_ids": row, "labels": row} for row in rows]


def test_real_text_of_one_domain_is_kept_while_another_is_learned(tmp_path):
    shakespeare, union = characters(0), characters(2)
    lost = {}
    for name, callbacks in {"plain": [], "held": [ConsolidationCallback(RWalk(), strength=30)]}.items():
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **size))
        seen = []
        for data in (shakespeare, union):
            one = trainer(tmp_path, model, data, callbacks, num_train_epochs=3, learning_rate=3e-3)
            one.train()
            seen.append(one.evaluate(shakespeare[:40])["eval_loss"])
        lost[name] = seen[1] - seen[0]
    assert lost["held"] < lost["plain"] - 0.05


def reader(texts):
    """A tokenizer of the words in some texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"], show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def test_intents_of_one_domain_are_kept_while_another_is_learned(tmp_path):
    known, unknown = table("clinc150"), table("clinc150", "validation")
    words = reader([row["text"] for row in known])

    def requests(rows, domain):
        mine = [row for row in rows if row["domain"] == domain]
        names = sorted({row["label"] for row in mine})
        read = [dict(words(row["text"], return_token_type_ids=False)) | {"text": row["text"]} for row in mine]
        return [batch | {"label": names.index(row["label"])} for batch, row in zip(read, mine, strict=True)]

    def right(predicted):
        return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}

    kept = {}
    for name, callbacks in {"plain": [], "held": [ConsolidationCallback(RWalk(), strength=2)]}.items():
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=15, hidden_dropout_prob=0.0, **size))
        for domain in (0, 1):
            one = Trainer(
                model=model,
                args=arguments(tmp_path, num_train_epochs=8, learning_rate=3e-3, per_device_train_batch_size=16),
                train_dataset=requests(known, domain)[::3],
                data_collator=transformers.DataCollatorWithPadding(words),
                callbacks=callbacks,
                compute_metrics=right,
            )
            one.train()
        kept[name] = [one.evaluate(requests(unknown, domain))["eval_accuracy"] for domain in (0, 1)]
    assert kept["held"][0] > kept["plain"][0] + 0.15
    assert sum(kept["held"]) > sum(kept["plain"]) + 0.05


class Averaging(TrainerCallback):
    """An average of the weights, put into the model when training ends."""

    def on_step_end(self, args, state, control, model=None, **_):
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.average = {name: p.lerp(self.average[name], 0.8) for name, p in now.items()} if state.global_step > 1 else now

    def on_train_end(self, args, state, control, model=None, **_):
        for name, p in model.named_parameters():
            p.data.copy_(self.average[name])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", [None, RWalk(delta_t=3), SI()], ids=repr)
def test_callbacks_that_change_the_weights_at_the_end_come_first_wherever_they_stand(rule, first, tmp_path):
    model, callback = bert(), ConsolidationCallback(rule)
    for task in range(2):
        averaging = Averaging()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The weights .* changed after the last step")
            trainer(tmp_path, model, sentences(task), [callback, averaging] if first else [averaging, callback]).train()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), averaging.average[name], **EXACT)
            torch.testing.assert_close(callback.memory.anchor.point[name], p.detach(), **EXACT)
