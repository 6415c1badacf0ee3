"""A model that learns from a teacher: who teaches, what is compared, what moves, and what is refused."""

from __future__ import annotations

import gc
import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from ctxext.config.loader import build
from ctxext.data.documents import SELF
from ctxext.errors import InputError, ModelError, SpecError
from ctxext.model.adapters import attach, trainable
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import build_model, causal_lm, load_model
from ctxext.model.relayout import relayout, rotations
from ctxext.model.source import original_config, resolve
from ctxext.ops.masks import Pattern
from ctxext.train import distill, recompute
from ctxext.train.distill import TeacherModel, distillation_loss
from ctxext.train.engine import LossModel
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec, MemorySpec, Objective
from ctxext.train.loop import Events
from ctxext.train.loss import IGNORED
from ctxext.train.parallel import plan_launch
from ctxext.train.run_directory import plan_repeated, plan_resumed, start_run
from ctxext.train.run_plan import plan_run
from ctxext.train.teacher import objective_at

FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True}),
]
EVERYTHING = Objective(kl=1.0, ce=0.5, hidden=0.3, attention=0.2)
T = 48


def make_plan(model: Path, **fields: Any):
    defaults = {"ctx": 64, "steps": 4, "global_batch_size": 2, "distill": {}, "validation": {"every_steps": None}}
    spec = build(FinetuneSpec, {**defaults, "lora": {"rank": 4, "alpha": 8.0}, **fields}, source="test")
    return plan_run(resolve(str(model)), spec)


@pytest.fixture(scope="module")
def convert(model_dir, tmp_path_factory):
    """convert(family, **changes) -> the directory of a conversion, SN with a window of 8."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **changes: Any) -> Path:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("conversion") / "out"
            source = model_dir(family, **changes)
            run_conversion(plan_conversion(str(source), "SN", out=made[key], sliding_window=8), gate=False)
        return made[key]

    return make


def student_and_teacher(directory: Path, **fields: Any):
    """A student whose adapter, embeddings and norms are not where they began, and its teacher."""
    plan = make_plan(directory, **fields)
    torch.manual_seed(0)
    model = build_model(directory, plan.config, torch.float32)
    model = attach(model, plan.trainables, plan.spec.lora.rank, str(directory))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, TeacherModel(relayout(model, plan.teacher.config), plan.teacher.length), plan


def rows(T: int = T, b: int = 2, vocabulary: int = 260) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels (some of which do not count), and the starts of two documents a row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocabulary, (b, T), generator=generator)
    labels = torch.randint(vocabulary, (b, T), generator=generator)
    labels[:, ::7] = IGNORED
    starts = torch.zeros(b, T, dtype=torch.int64)
    starts[:, T // 3 :] = T // 3
    return ids, labels, starts


@pytest.mark.parametrize(("family", "changes"), [*FAMILIES, ("mistral", {"sliding_window": 16})])
def test_the_self_teacher_is_the_source_exactly_whatever_the_student_learned(family, changes, model_dir, convert):
    student, teacher, _ = student_and_teacher(convert(family, **changes))
    ids = rows()[0]
    with torch.no_grad():
        truth = load_model(model_dir(family, **changes), device="cpu").model(input_ids=ids).logits
        assert torch.equal(teacher.model(input_ids=ids).logits, truth)
        assert (student(input_ids=ids).logits - truth).abs().max() > 0.1


def test_a_plan_says_which_of_its_selves_a_model_learns_from(model_dir, convert):
    assert make_plan(convert()).teacher.description.startswith("itself before conversion, to 64 tokens")
    stretched = make_plan(model_dir(), ctx=128).teacher.description
    assert stretched.startswith("itself before this training (it was not converted), to 64 tokens")


def test_a_head_that_trains_with_the_embedding_is_not_the_teachers(model_dir, convert):
    """As a PEFT leaves it that ties the head to the trained copy instead of wrapping it."""
    student, teacher, plan = student_and_teacher(convert(tie_word_embeddings=True))
    base = causal_lm(student)
    trained = base.get_input_embeddings().modules_to_save["default"].weight
    base.set_output_embeddings(torch.nn.Linear(*reversed(trained.shape), bias=False))
    base.get_output_embeddings().weight = trained
    again = relayout(student, plan.teacher.config)
    ids = rows()[0]
    assert torch.equal(again(input_ids=ids).logits, teacher.model(input_ids=ids).logits)


@pytest.mark.parametrize(("quantize", "dtype"), [("int8", "float32"), ("nf4", "float32"), ("none", "bfloat16")])
def test_the_self_teacher_of_a_rounded_base_is_the_source_rounded_alike(quantize, dtype, model_dir, convert):
    changes = {"hidden_size": 64, "intermediate_size": 128}  # widths that nf4's CPU kernels take
    directory = convert(**changes)
    plan = make_plan(directory, memory={"quantize": quantize}, dtype=dtype)
    options: dict[str, Any] = {"quantize": quantize}
    student = build_model(directory, plan.config, getattr(torch, dtype), **options)
    student = attach(student, plan.trainables, plan.spec.lora.rank, "base")
    source = resolve(str(model_dir(**changes)))
    truth: Any = build_model(source.directory, source.config, getattr(torch, dtype), **options).eval()
    ids = rows()[0]
    with torch.no_grad():
        assert torch.equal(relayout(student, plan.teacher.config)(input_ids=ids).logits, truth(input_ids=ids).logits)


def test_the_self_teacher_takes_no_memory_of_its_own(write_model, tmp_path):
    source = write_model(tmp_path / "source", hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    run_conversion(plan_conversion(str(source), "SN", out=tmp_path / "out", sliding_window=8), gate=False)
    plan = make_plan(tmp_path / "out")
    model = build_model(tmp_path / "out", plan.config, torch.float32)
    model = attach(model, plan.trainables, plan.spec.lora.rank, "base")
    size = sum(p.nbytes for p in model.parameters())
    model(input_ids=rows()[0])  # what a first forward allocates is not the teacher's
    gc.collect()
    before = psutil.Process().memory_info().rss
    teacher = relayout(model, plan.teacher.config)
    with torch.no_grad():
        teacher(input_ids=rows()[0])
    grown = psutil.Process().memory_info().rss - before
    assert size > 80e6 and grown < 0.1 * size
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in teacher.parameters()} <= own


def reference(hidden, weight, said, theirs, labels, ce, kl, top_k=None):
    """The same in the open: whole logits, torch's own derivative."""
    z, y = (hidden @ weight.t()).log_softmax(-1), (said @ theirs.t()).log_softmax(-1)
    text = -z.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    p, q = y.exp(), z.exp()
    if top_k is not None:
        index = y.argsort(descending=True)[:, :top_k]
        p, q = p.gather(-1, index), q.gather(-1, index)
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    return (ce * text + kl * (p * (p / q).log()).sum(-1)).sum()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("chunk", [1, 7, 37, None])
def test_the_chunked_loss_and_its_gradients_are_those_of_whole_logits(chunk, top_k):
    g = torch.Generator().manual_seed(0)
    N, E, V = 37, 16, 53
    hidden, weight, said, theirs = (torch.randn(n, E, generator=g, dtype=torch.float64).float() for n in (N, V, N, V))
    labels = torch.randint(V, (N,), generator=g)
    ce, kl = torch.rand(N, generator=g), torch.rand(N, generator=g)
    labels[5], ce[5], kl[3:9] = IGNORED, 0.0, 0.0
    wanted = hidden.requires_grad_(), weight.requires_grad_()
    ours = distillation_loss(hidden, weight, said, theirs, labels, ce, kl, top_k=top_k, chunk=chunk)
    truth = reference(hidden, weight, said, theirs, labels, ce, kl, top_k)
    torch.testing.assert_close(ours, truth)
    for got, want in zip(torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * truth, wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_without_a_teacher_it_is_the_cross_entropy_and_top_k_of_all_is_the_whole():
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 8, generator=g), torch.randn(11, 8, generator=g)
    labels, ones = torch.arange(9), torch.ones(9)
    alone = distillation_loss(hidden, weight, None, weight, labels, ones, 0 * ones)
    torch.testing.assert_close(alone, torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum"))
    said = torch.randn(9, 8, generator=g)
    whole, all_of_them = (
        distillation_loss(hidden, weight, said, weight, labels, 0 * ones, ones, top_k=k) for k in (None, 11)
    )
    assert torch.equal(whole, all_of_them)
    assert distillation_loss(hidden, weight, hidden, weight, labels, 0 * ones, ones).abs() < 1e-5


def test_top_k_holds_where_the_student_is_sure():
    """1 minus the mass of the best is 0 in fp32 then, and what is divided by it is no gradient."""
    hidden = torch.zeros(1, 40)
    hidden[0, 3] = 25.0
    said = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    labels, one, eye = torch.tensor([0]), torch.ones(1), torch.eye(40)
    leaf = hidden.double().requires_grad_()
    ours_leaf = hidden.clone().requires_grad_()
    ours = distillation_loss(ours_leaf, eye, said, eye, labels, 0 * one, one, top_k=8)
    truth = reference(leaf, eye.double(), said.double(), eye.double(), labels, 0 * one, one, 8)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)
    got, want = torch.autograd.grad(ours, ours_leaf)[0], torch.autograd.grad(truth, leaf)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["kl", "hidden", "attention"])
def test_gradients_do_not_depend_on_the_micro_batch(name, convert):
    student, teacher, _ = student_and_teacher(convert())
    ids, labels, starts = rows(b=3)
    ids[1] = ids[1, 0]  # a row of another kind
    model, parameters = LossModel(student, teacher), list(trainable(student).values())

    def gradients(*micro: slice) -> list[Tensor]:
        losses = [
            model(ids[rows], labels[rows], objective=Objective(**{name: 1.0}), document_starts=starts[rows])
            for rows in micro
        ]
        return [g for g in torch.autograd.grad(sum(losses), parameters, allow_unused=True) if g is not None]

    for whole, parts in zip(gradients(slice(0, 3)), gradients(slice(0, 1), slice(1, 3)), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def slow_loss(student, teacher, objective, ids, labels, starts, length) -> Tensor:
    """The objective by hand: documents one by one, whole logits, every layer in the open."""
    total = torch.zeros(())
    for row in range(len(ids)):
        bounds = [0, ids.shape[1]] if starts is None else [0, *starts[row].unique().tolist()[1:], ids.shape[1]]
        for begin, end in pairwise(bounds):
            x, y = ids[row : row + 1, begin:end], labels[row, begin:end]
            z = student(input_ids=x).logits[0].log_softmax(-1)
            with torch.no_grad():
                p = teacher(input_ids=x[:, :length]).logits[0].softmax(-1)
            n = len(p)
            counts = y != IGNORED
            text = -z.gather(-1, y.clamp(min=0)[:, None])[:, 0] * counts
            divergence = (p * (p.log() - z[:n])).sum(-1) * counts[:n]
            total = total + objective.kl * divergence.sum() + objective.ce * text[:n].sum()
            total = total + objective.beyond * text[n:].sum()
    return total


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [T, 20, 10])
def test_the_teacher_is_asked_within_its_length_and_the_text_beyond(length, masked, convert):
    student, teacher, _ = student_and_teacher(convert())
    objective = Objective(kl=1.0, ce=0.25, beyond=0.5)
    ids, labels, starts = rows()
    model = LossModel(student, teacher._replace(length=length))
    given = {"document_starts": starts} if masked else {}
    ours = model(ids, labels, objective=objective, **given)
    truth = slow_loss(student, teacher.model, objective, ids, labels, starts if masked else None, length)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)
    parameters = list(trainable(student).values())
    for got, want in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(truth, parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_no_row_of_the_teacher_is_longer_than_it_was_trained_for(convert):
    """Beyond its length nothing it says is used, and all it would cost is time: T times its length, not T squared."""
    teacher = TeacherModel(None, 10)
    ids, _, starts = rows()
    given, own = distill.taught_rows(teacher, ids, {"document_starts": starts, "backend": "naive", "group_size": 4})
    position = torch.arange(T)
    assert torch.equal(given, ids) and own["backend"] == "naive" and "group_size" not in own
    assert (position - own["document_starts"]).max() == 9
    within = position - starts < 10
    assert torch.equal(own["document_starts"][within], starts[within])
    assert distill.taught_rows(teacher, ids, {})[0].shape == (2, 10)


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_errors_of_layers_are_those_of_layers_compared_by_hand(family, changes, convert):
    student, teacher, _ = student_and_teacher(convert(family, **changes))
    ids, labels, _ = rows()
    counts = (labels != IGNORED)[..., None]

    def relative(found, true):
        return sum(
            ((a - b) ** 2 * c).sum() / ((b**2 * c).sum() / c.sum()) for a, b, c in zip(found, true, counts, strict=True)
        )

    mine, theirs = (causal_lm(m).get_decoder() for m in (student, teacher.model))
    states = [m(input_ids=ids, output_hidden_states=True).hidden_states for m in (mine, theirs)]
    last = len(mine.layers) - 1  # transformers gives the last layer's output after the norm: compared without it
    seen: list[Tensor] = []
    handles = [m.layers[last].register_forward_hook(lambda *a: seen.append(a[-1])) for m in (mine, theirs)]
    for m in (mine, theirs):
        m(input_ids=ids)
    for handle in handles:
        handle.remove()
    by_hand = [relative(a, b) for a, b in zip(*(s[1:-1] for s in states), strict=True)] + [relative(*seen)]
    model = LossModel(student, teacher)
    hidden = model(ids, labels, objective=Objective(hidden=2.0))
    torch.testing.assert_close(hidden, 2 * torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-4)

    by_hand = []
    for i, x in enumerate(states[1][:-1]):
        attended = [
            d.layers[i].self_attn(
                hidden_states=d.layers[i].input_layernorm(x),
                position_embeddings=rotations(d, x)(i),
                attention_mask=None,
            )[0]
            for d in (mine, theirs)
        ]
        by_hand.append(relative(*attended))
    ours = model(ids, labels, objective=Objective(attention=3.0))
    torch.testing.assert_close(ours, 3 * torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [{"checkpoint": True}, {"checkpoint": True, "keep": "attention"}])
def test_gradients_with_and_without_checkpointing_are_equal(memory, convert):
    """What is computed again must see the student's layout, its adapter and its norms, not the teacher's."""
    ids, labels, starts = rows()
    found = []
    for given in (None, memory):
        student, teacher, plan = student_and_teacher(convert())
        if given:
            patterns = [Pattern(kind.sliding_window) for kind in plan.kinds]
            recompute.enable(student, build(MemorySpec, given, source="test"), patterns)
        model = LossModel(student.train(), teacher)
        loss = model(ids, labels, objective=EVERYTHING, document_starts=starts)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in trainable(student).items()}))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_the_teacher_stays_where_it_is_while_the_student_moves(convert):
    student, teacher, _ = student_and_teacher(convert())
    ids, labels, _ = rows()
    model, before = LossModel(student, teacher), teacher.model(input_ids=ids).logits
    optimizer = torch.optim.SGD(trainable(student).values(), lr=1e-3)
    was = student(input_ids=ids).logits
    model(ids, labels, objective=EVERYTHING).backward()
    optimizer.step()
    assert torch.equal(teacher.model(input_ids=ids).logits, before)
    assert not torch.equal(student(input_ids=ids).logits, was)
    assert all(p.grad is None for p in teacher.model.parameters())


def test_objectives_follow_each_other_by_their_shares():
    objectives = [Objective(attention=1.0, share=0.25), Objective(kl=1.0, share=0.5), Objective(ce=1.0, share=0.25)]
    at = [objectives.index(objective_at(objectives, step, 8)) for step in range(8)]
    assert at == [0, 0, 1, 1, 1, 1, 2, 2]
    tiny = [Objective(kl=1.0, share=1e-6), Objective(ce=1.0), Objective(hidden=1.0, share=1e-6)]
    assert [tiny.index(objective_at(tiny, step, 3)) for step in range(3)] == [0, 1, 2]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into many sequences. {i * i}\n" for i in range(400)))
    return path


def run(plan, directory: Path, **kwargs):
    start_run(plan, directory)
    return run_finetune(plan, directory, **kwargs)


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_heals_and_resumes_to_the_same_numbers(convert, text, tmp_path):
    fields = {
        "steps": 6,
        "data": {"source": str(text)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 0},
        "distill": {"objectives": [{"attention": 1.0, "share": 0.34}, {"kl": 1.0, "share": 0.66}]},
    }
    whole = make_plan(convert(), **fields)
    report = run(whole, tmp_path / "whole")
    found = losses(tmp_path / "whole")
    assert report.finished and found[1] < found[0] and found[-1] < 0.95 * found[2]
    assert (report.first_loss, report.final_loss) == (found[2], found[-1])  # both of the last objective

    def stop(metrics):
        if metrics.step == 3:
            signal.raise_signal(signal.SIGTERM)

    assert not run(whole, tmp_path / "halves", events=Events(on_step=stop)).finished
    run_finetune(plan_resumed(tmp_path / "halves"), tmp_path / "halves", resume=True)
    assert losses(tmp_path / "halves") == found


def test_the_next_objective_is_not_taken_for_a_spike(convert, text, tmp_path):
    """The loss rises by far more than `spike` where the objective changes, and nothing is wrong."""
    objectives = [{"attention": 0.01}, {"kl": 10.0}]
    plan = make_plan(
        convert(),
        steps=16,
        global_batch_size=1,
        data={"source": str(text)},
        distill={"objectives": objectives},
        faults={"spike": 3.0, "on_divergence": "stop"},
    )
    assert run(plan, tmp_path / "run").finished
    found = losses(tmp_path / "run")
    assert found[8] > found[7] + 4.0


def test_an_objective_that_changes_with_the_context_is_clipped_by_its_own_norms(convert, text, tmp_path):
    plan = make_plan(
        convert(),
        stages=[32],
        steps=16,
        data={"source": str(text)},
        distill={"objectives": [{"attention": 0.01}, {"kl": 1.0}]},
    )
    assert plan.stage_of(8) is plan and plan.objective_at(7) != plan.objective_at(8)
    assert run(plan, tmp_path / "run").spikes == 0


def test_a_teacher_that_changed_is_noticed(write_model, convert, text, tmp_path):
    other = write_model(tmp_path / "teacher", seed=1)
    plan = make_plan(convert(), data={"source": str(text)}, distill={"teacher": str(other)})

    def stop(metrics):
        signal.raise_signal(signal.SIGTERM)

    run(plan, tmp_path / "run", events=Events(on_step=stop))
    write_model(other, seed=2)
    with pytest.raises(ModelError, match="the teacher's weights are not those"):
        plan_resumed(tmp_path / "run")
    with pytest.raises(InputError, match="the teacher's weights"):
        plan_repeated(tmp_path / "run")


def test_another_model_teaches_from_its_directory(model_dir, convert, text, tmp_path):
    """On the source itself as teacher, a run is the run of its self-teacher, bit by bit."""
    fields = {"steps": 2, "data": {"source": str(text)}}
    run(make_plan(convert(), **fields), tmp_path / "self")
    given = make_plan(convert(), **fields, distill={"teacher": str(model_dir())})
    assert "second model" not in given.teacher.description
    run(given, tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "ctxext.json").read_text())
    assert manifest["parents"]["teacher"]["path"] == str(model_dir())
    assert losses(tmp_path / "self") == losses(tmp_path / "other")


def test_a_model_learns_from_text_of_its_own(convert, tmp_path):
    said: list[str] = []
    data = {"source": SELF, "samples": {"tokens": 600, "batch": 4}}
    plan = make_plan(convert(), steps=2, data=data)
    run(plan, tmp_path / "run", events=Events(say=said.append))
    assert sum("sampling 600 tokens" in line for line in said) == 1
    run(plan, tmp_path / "again", events=Events(say=said.append))
    assert sum("sampling 600 tokens" in line for line in said) == 1, "the samples are kept"
    assert losses(tmp_path / "run") == losses(tmp_path / "again")
    mixed = make_plan(
        convert(), steps=1, data={"mixture": [{"source": SELF}, {"source": "embedded"}], "samples": data["samples"]}
    )
    run(mixed, tmp_path / "mixed", events=Events(say=said.append))
    assert any("its own samples (50.0% of the sequences)" in line for line in said)


REFUSED = [
    ({"tuning": "full"}, "the teacher's weights would change"),
    ({"distill": {"objectives": [{"hidden": 1.0}]}, "memory": {"tiles": 16}}, "tiles: 16 does not keep"),
    ({"distill": {"objectives": [{"attention": 1.0}]}, "memory": {"checkpoint": 2}}, "checkpoint: 2 does not keep"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_refused(fields, said, convert):
    with pytest.raises(InputError, match=said):
        make_plan(convert(), **fields)


def test_weights_that_are_not_the_pretrained_ones_do_not_teach_themselves(convert, text, tmp_path):
    run(make_plan(convert(), steps=1, data={"source": str(text)}, tuning="full", distill=None), tmp_path / "trained")
    for fields in ({}, {"distill": None, "data": {"source": SELF}}):
        with pytest.raises(InputError, match="trained after pretraining"):
            make_plan(tmp_path / "trained", **fields)


def test_a_model_that_was_not_converted_has_nothing_to_heal(model_dir):
    with pytest.raises(InputError, match="was not converted: it would be its own teacher"):
        make_plan(model_dir())
    assert make_plan(model_dir(), ctx=128).teacher is not None, "beyond its length there is something to learn"
    assert make_plan(model_dir(), distill={"objectives": [{"kl": 1.0, "ce": 1.0}]}).teacher is not None


def test_another_vocabulary_or_shape_does_not_teach(convert, model_dir):
    with pytest.raises(InputError, match="their vocabularies differ"):
        make_plan(convert(), distill={"teacher": str(model_dir(vocab_size=300))})
    small = str(model_dir(num_hidden_layers=2))
    assert make_plan(convert(), distill={"teacher": small}).teacher.source is not None
    with pytest.raises(InputError, match="need layers of one size"):
        make_plan(convert(), distill={"teacher": small, "objectives": [{"hidden": 1.0}]})
    with pytest.raises(InputError, match="under ZeRO 3"):
        plan_launch(make_plan(convert(), distill={"teacher": small}), "3", 2, None)


def test_objectives_without_weight_are_no_objectives():
    with pytest.raises(SpecError, match="at least one of kl, ce, hidden, attention"):
        build(FinetuneSpec, {"ctx": 64, "distill": {"objectives": [{"share": 1.0}]}}, source="test")
    with pytest.raises(SpecError, match="top_k: 5 is given, but kl has no weight"):
        build(FinetuneSpec, {"ctx": 64, "distill": {"objectives": [{"ce": 1.0, "top_k": 5}]}}, source="test")


def test_a_quantised_teacher_says_what_is_compared(convert):
    plan = make_plan(convert(), memory={"quantize": "int8"})
    assert "the teacher is the quantised model" in plan.teacher.description


def test_the_config_of_the_source_is_read_back_from_a_conversion(convert, model_dir):
    for family, changes in FAMILIES:
        config = original_config(resolve(str(convert(family, **changes))))
        source = resolve(str(model_dir(family, **changes)))
        for name in ("max_position_embeddings", "rms_norm_eps", "vocab_size"):
            assert config.fields[name] == source.config.fields[name]
