"""`blend`, `warm_head`, `distill`, `snapshot` and `once` in Trainer give what the same lines give in a loop by hand."""

import copy
from warnings import catch_warnings, simplefilter

import pytest
import torch

pytest.importorskip("transformers", reason="needs Transformers: make test-integrations")

from test_transformers import (
    EXACT,
    arguments,
    batches,
    bert,
    by_hand,
    classified,
    gpt,
    mean_over_the_step,
    same,
    sentences,
    trainer,
)
from transformers import BertForMaskedLM, Trainer, TrainerCallback

from rwalk import EWC, Consolidator, Distillation, RWalk, Snapshot, warm_head
from rwalk.integrations.transformers import ConsolidationCallback, protect

ORDER = {"train_sampling_strategy": "sequential"}
TASKS = [sentences(0), sentences(1)]


def train(folder, model, tasks, callback, **options):
    for data in tasks:
        trainer(folder, model, data, [callback], mean_over_the_step, **ORDER | options).train()
    return callback.memory


class Interrupt(TrainerCallback):
    def __init__(self, after=1):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_each_task_goes_part_of_the_way_back_to_its_start(tmp_path):
    model, other = bert(), bert()
    memory = train(tmp_path, model, TASKS, ConsolidationCallback(RWalk(), 0.5, blend=0.25, exclude="classifier"))
    ours = Consolidator(other, RWalk(), 0.5, exclude="classifier")
    ours.mark()
    for data in TASKS:
        start = weights(other)
        twin, copied = copy.deepcopy((other, ours))
        by_hand(twin, [data], copied)
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
        ours.attach(optimizer)
        total = 2 * len(batches(data))
        for step in range(total):
            optimizer.param_groups[0]["lr"] = 0.01 * (total - step) / total
            optimizer.zero_grad()
            classified(other.train(), batches(data)[step % (total // 2)]).backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
        end = weights(twin)
        ours.consolidate(blend=0.25)
        ours.detach()
        for name, p in other.named_parameters():
            expected = end[name] if name.startswith("classifier") else 0.75 * end[name] + 0.25 * start[name]
            torch.testing.assert_close(p.detach(), expected)
    same(memory, ours)


@pytest.mark.parametrize("head", [True, "classifier"])
def test_a_head_is_fitted_before_each_task_and_nothing_else_changes(tmp_path, head):
    model, other, third = bert(), bert(), bert()
    callback, ours = ConsolidationCallback(RWalk(), 0.5, warm_head=head), Consolidator(other, RWalk(), 0.5)
    for data in TASKS:
        new = torch.nn.Linear(8, 3).to(model.classifier.weight.dtype)
        model.classifier, other.classifier = new, copy.deepcopy(new)
        with catch_warnings():
            simplefilter("ignore")  # of a module that was replaced
            memory = train(tmp_path, model, [data], callback)
            warm_head(other, batches(data, 8), "classifier")
            by_hand(other, [data], ours)
    same(memory, ours, rtol=1e-6, atol=1e-8)
    left = warm_head(third, batches(TASKS[0]))
    assert left < float(classified(bert(), batches(TASKS[0], 24)[0]).detach())


def test_a_head_of_an_earlier_task_is_not_fitted_anew(tmp_path):
    model, callback = bert(), ConsolidationCallback(warm_head=True)
    train(tmp_path, model, TASKS[:1], callback)
    before = weights(model)
    with pytest.raises(ValueError, match=r"fitted for an earlier task.*model.classifier = heads\[task\]"):
        train(tmp_path, model, TASKS[1:], callback)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("again", "options"), [("resumed", {}), ("resumed", {"exclude": "classifier"}), ("loaded", {})])
def test_a_shared_head_is_not_fitted_anew_after_resuming_or_by_a_new_callback(tmp_path, again, options):
    model, save = bert(), {"save_strategy": "epoch"}
    callbacks = [ConsolidationCallback(warm_head=True, **options), Interrupt(after=8)]
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, TASKS[0], callbacks, mean_over_the_step, **save).train()
    model, callback = bert(), ConsolidationCallback(warm_head=True, **options)
    trainer(tmp_path, model, TASKS[0], [callback], mean_over_the_step, **save).train(resume_from_checkpoint=True)
    if again == "loaded":
        callback.memory.save(tmp_path / "memory.safetensors")
        memory = Consolidator(model)
        memory.load(tmp_path / "memory.safetensors")
        callback = ConsolidationCallback(memory, warm_head=True)
    before = weights(model)
    with pytest.raises(ValueError, match="fitted for an earlier task"):
        train(tmp_path, model, TASKS[1:], callback)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_head_that_was_only_there_when_a_model_was_protected_is_fitted(tmp_path):
    model = bert()
    memory = protect(model, TASKS[0], EWC(labels="sample"))
    before = weights(model)
    trainer(tmp_path, model, TASKS[0], [ConsolidationCallback(memory, warm_head=True)], learning_rate=0.0).train()
    assert not torch.equal(before["classifier.weight"], model.classifier.weight)


def test_a_head_of_several_labels_for_each_example_is_fitted_to_yes_and_no(tmp_path):
    model, ids, labels = few_labels("several")
    other, data = copy.deepcopy(model), [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    trainer(tmp_path, model, data, [ConsolidationCallback(RWalk(), warm_head=True)], learning_rate=0.0).train()
    warm_head(other, [{"input_ids": ids, "labels": labels}], loss=torch.nn.functional.binary_cross_entropy_with_logits)
    torch.testing.assert_close(weights(model), weights(other))


def test_a_checkpoint_with_nothing_left_to_train_is_said_to_be_one(tmp_path):
    model, callback = bert(), ConsolidationCallback()
    trainer(tmp_path, model, TASKS[0], [callback], mean_over_the_step, save_strategy="epoch").train()
    again = trainer(tmp_path, model, TASKS[1], [callback], mean_over_the_step, save_strategy="epoch")
    with pytest.warns(UserWarning, match="nothing is left to train.*an `output_dir` of its own"):
        again.train(resume_from_checkpoint=True)


def test_old_answers_are_part_of_the_loss_in_training_alone(tmp_path):
    model, other = bert(), bert()
    before = bert().eval()
    keep = Distillation(model, weight=3.0, temperature=1.0)

    def both(outputs, labels, num_items_in_batch):
        raise AssertionError("the model's own loss is used")

    def by_hand_loss(current, batch):
        output = current(input_ids=batch["input_ids"], labels=batch["labels"])
        p = before(input_ids=batch["input_ids"]).logits.softmax(1).detach()
        return output.loss + 3 * (p * (p.log() - output.logits.log_softmax(1))).sum(1).mean()

    callback = ConsolidationCallback(RWalk(), 0.5, distill=keep)
    for data in TASKS:
        one = trainer(tmp_path, model, data, [callback], **ORDER)
        one.train()
        with torch.no_grad():
            plain = model.eval()(**batches(data)[0])
        assert float(plain.loss) == pytest.approx(
            float(torch.nn.functional.cross_entropy(plain.logits, batches(data)[0]["labels"]))
        )
    same(callback.memory, by_hand(other, TASKS, Consolidator(other, RWalk(), 0.5), loss=by_hand_loss), rtol=1e-7, atol=1e-9)


class Noting(Trainer):
    """Notes the losses that it gets."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.noted = [*getattr(self, "noted", []), float(loss.detach())]
        return loss


def few_labels(kind):
    """A model, and eight examples whose labels mostly do not count, or are several for each."""
    torch.manual_seed(4)
    ids = torch.randint(1, 20, (8, 8))
    if kind == "causal":
        return gpt(), ids, torch.where(torch.arange(8) > 5, ids, -100)
    if kind == "masked":
        return bert(kind=BertForMaskedLM), ids, torch.where(torch.arange(8) == torch.arange(8).unsqueeze(1), ids, -100)
    model = bert()
    model.config.problem_type = "multi_label_classification"
    return model, ids, (torch.rand(8, 3) < 0.5).double()


@pytest.mark.parametrize("kind", ["causal", "masked", "several"])
def test_the_term_is_the_mean_over_rows_however_many_labels_count(tmp_path, kind):
    model, ids, labels = few_labels(kind)
    old, data = copy.deepcopy(model), [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    keep = Distillation(old, weight=2.0)
    term = float(keep({"input_ids": ids}, model.eval()(input_ids=ids)).detach())
    assert term > 1e-3
    for parts in (1, 2):
        settings = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "num_train_epochs": 1}
        losses = []
        for callbacks in ([], [ConsolidationCallback(RWalk(), distill=keep)]):
            args = arguments(tmp_path, learning_rate=0.0, **settings, **ORDER)
            one = Noting(copy.deepcopy(model), args, train_dataset=data, callbacks=callbacks)
            one.train()
            losses.append(sum(one.noted))
        assert losses[1] - losses[0] == pytest.approx(term, rel=1e-5)


def test_an_interrupted_training_leaves_no_term_in_the_models_loss(tmp_path):
    model = bert()
    callback = ConsolidationCallback(RWalk(), distill=Distillation(model, 5.0))
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, TASKS[0], [callback, Interrupt()]).train()
    assert float(model.train()(**batches(TASKS[0])[0]).loss.detach()) == float(
        model.eval()(**batches(TASKS[0])[0]).loss.detach()
    )
    model.train()(input_ids=batches(TASKS[0])[0]["input_ids"])  # without labels, so without a loss
    trainer(tmp_path, model, TASKS[0], [], label_smoothing_factor=0.1).train()


def test_what_is_kept_is_in_the_logs_of_evaluations(tmp_path):
    model = bert()
    snapshot = Snapshot(model, batches(sentences(3)))
    callback = ConsolidationCallback(RWalk(), 0.5, snapshot=snapshot)
    settings = arguments(tmp_path, eval_strategy="epoch")
    one = Trainer(model=model, args=settings, train_dataset=TASKS[0], eval_dataset=TASKS[1], callbacks=[callback])
    one.train()
    logged = [entry for entry in one.state.log_history if "kept/similarity" in entry]
    evaluated = [entry for entry in logged if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert all(0 < entry["kept/similarity"] < 1 and entry["kept/divergence"] > 0 for entry in evaluated)
    assert logged[-1]["kept/neighbours"] == snapshot.kept().neighbours  # of the model as the task's end has left it
    assert "eval_loss" not in logged[-1]


def test_once_nothing_is_consolidated(tmp_path):
    model, other = bert(), bert()
    memory = protect(model, TASKS[0], EWC(), 2.0)
    point = {name: t.clone() for name, t in memory.anchor.point.items()}
    callback = ConsolidationCallback(memory, once=True)
    train(tmp_path, model, TASKS, callback)
    assert memory.tasks == 1
    torch.testing.assert_close(memory.anchor.point, point, **EXACT)
    ours = Consolidator(other, EWC(), 2.0)
    ours.estimate(batches(TASKS[0], 8))
    ours.consolidate = lambda **_: None
    by_hand(other, TASKS, ours)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-12)


def test_once_with_nothing_to_hold_is_refused():
    for wrong in ({}, {"rule": RWalk()}, {"rule": Consolidator(bert())}):
        with pytest.raises(ValueError, match="the memory has to hold something already"):
            ConsolidationCallback(**wrong, once=True)
    memory = protect(bert(), TASKS[0], EWC())
    with pytest.raises(ValueError, match="cannot average or go back"):
        ConsolidationCallback(memory, once=True, blend=0.5)
    with pytest.raises(ValueError, match="must be a number from 0"):
        ConsolidationCallback(RWalk(), blend=2)


def test_a_part_may_be_left_free(tmp_path):
    model = bert()
    memory = train(tmp_path, model, TASKS[:1], ConsolidationCallback(RWalk(), only=model.bert))
    assert all(name.startswith("bert.") for name in memory.anchor.point)
    assert len(memory.anchor.point) == len(list(model.bert.parameters()))


def test_a_new_callback_for_each_trainer_warns(tmp_path):
    model = bert()
    train(tmp_path, model, TASKS[:1], ConsolidationCallback(RWalk()))
    with pytest.warns(UserWarning, match="Another memory has learned tasks of this model"):
        train(tmp_path, model, TASKS[1:], ConsolidationCallback(RWalk()))
