"""Learned sinks in place of the first token: the class that has them, the closed form, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ctxext import api
from ctxext.doctor import model as doctor
from ctxext.errors import InputError
from ctxext.evals.verify import plan_launch, verify
from ctxext.model.adapter_plan import FITTED
from ctxext.model.families import NO_SINK
from ctxext.model.layout import LayerKind
from ctxext.model.load import hidden_states, load_model
from ctxext.model.relayout import relayout, rotations
from ctxext.model.shards import tensor_reader
from ctxext.model.source import original_config, resolve
from ctxext.requests import ConvertRequest
from ctxext.retrofit import fitted_sinks
from ctxext.retrofit.conversion import planned_conversion
from ctxext.retrofit.damage import final_states, open_layers
from ctxext.train.run_directory import plan_from_options

IDS = torch.arange(60)[None] * 7 % 250


@pytest.fixture
def hangs(monkeypatch):
    """Every model, with all its layers, counts as one that relies on its first token."""
    monkeypatch.setattr(fitted_sinks, "SINK_SHARE", 0.0)
    monkeypatch.setattr(fitted_sinks, "LAYER_SHARE", 0.0)


def convert(model: Path, out: Path, layout: str = "SSFN", **options) -> tuple[Path, list[str]]:
    said: list[str] = []
    given = {"sliding_window": 8, "model_class": "granite_swa"} | options
    api.convert(model, layout, out=out, say=said.append, **given)
    return out, said


def stock(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("fitted", [False, True], ids=["no-sinks", "fitted"])
def test_the_class_holds_the_source_and_stock_transformers_reads_what_ctxext_reads(
    family, changes, fitted, model_dir, tmp_path, monkeypatch
):
    """The gate has compared the source's own layout (difference 0) and the layout with sinks."""
    monkeypatch.setattr(fitted_sinks, "SINK_SHARE", 0.0 if fitted else 1.0)
    out, _ = convert(model_dir(family, **changes), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "granite_swa" and config["layer_rope_theta"] == [10_000, 10_000, 10_000, 0]
    assert bool(resolve(str(out)).manifest.facts.get("sinks")) == fitted
    logits = tensor_reader(out)("model.layers.0.self_attn.sinks"), tensor_reader(out)("model.layers.2.self_attn.sinks")
    assert (logits[0] != NO_SINK).all() == fitted and (logits[1] == NO_SINK).all()
    with torch.no_grad():
        theirs = stock(out)(IDS).logits
        ours = load_model(out, device="cpu").model(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_sinks_it_computes_what_the_other_class_does(model_dir, tmp_path):
    """`--sinks none`, and auto where no sink is found: to the digit."""
    model = model_dir("llama")
    states = [
        hidden_states(load_model(convert(model, tmp_path / name, **options)[0], device="cpu").model, IDS)
        for name, options in (
            ("none", {"sinks": "none"}),
            ("auto", {}),
            ("other", {"model_class": "smollm3", "sinks": "none"}),
        )
    ]
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def with_a_constant_first_logit(model: Path) -> None:
    """The key of token 0 at the beginning becomes zero: its logit is 0 for every query, and its value is what it was.

    A model of one layer, so that the key depends on that token alone.
    """
    loaded = stock(model)
    layer = loaded.model.layers[0]
    x = layer.input_layernorm(loaded.model.embed_tokens.weight[:1])[0].detach()
    with torch.no_grad():
        weight = layer.self_attn.k_proj.weight
        weight -= torch.outer(weight @ x, x) / (x @ x)
    loaded.save_pretrained(model)


def test_a_constant_logit_moves_into_sink_and_biases_exactly(write_model, tmp_path, hangs):
    """For every query beyond the window the conversion is the source in which the first token stays visible."""
    model = write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    with_a_constant_first_logit(model)
    W, T, source = 8, 60, resolve(str(model))
    ids = torch.cat((torch.zeros(3, 1, dtype=torch.int64), torch.randint(2, 250, (3, T - 1))), dim=1)
    kinds = (LayerKind(True, W),)
    options = {"target": "granite_swa", "biases": True}
    layers = open_layers(source.config, source.kinds, kinds, tensor_reader(model), torch.device("cpu"), **options)
    first = fitted_sinks.first_token(layers, ids, W)
    values = fitted_sinks.sink_values(layers, kinds, first)
    assert first.logits[0].abs().max() < 1e-5

    out, _ = convert(model, tmp_path / "out", "S", sinks="none")
    converted = stock(out)
    attention = converted.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        part = getattr(attention, name)
        part.bias = nn.Parameter(values.get(f"model.layers.0.self_attn.{name}.bias", torch.zeros(part.out_features)))
    attention.sinks.data.copy_(values["model.layers.0.self_attn.sinks"])

    q, k = torch.arange(T)[:, None], torch.arange(T)
    seen = (k <= q) & ((q - k < W) | (k == 0))
    mask = torch.zeros(T, T).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None].expand(3, -1, -1, -1)
    with torch.no_grad():
        visible, ours = stock(model)(ids, attention_mask=mask).logits, converted(ids).logits
    torch.testing.assert_close(ours[:, W:], visible[:, W:], rtol=1e-4, atol=1e-5)
    assert (ours[:, 0] - visible[:, 0]).abs().max() < 1e-5  # the first token's own output


def test_layers_that_do_not_rely_on_the_first_token_get_no_sink(model_dir, tmp_path, monkeypatch):
    """In them the first token is an ordinary one, and its value in one text is wrong in another."""
    model, shares = model_dir("llama"), []
    real = fitted_sinks.first_token
    monkeypatch.setattr(fitted_sinks, "first_token", lambda *given: shares.append(real(*given)) or shares[-1])
    monkeypatch.setattr(fitted_sinks, "SINK_SHARE", 0.0)
    convert(model, tmp_path / "all", "S")
    # A limit between the layers, so that some of them are below it.
    limit = sorted(shares[0].shares)[2]
    monkeypatch.setattr(fitted_sinks, "LAYER_SHARE", limit)
    out, _ = convert(model, tmp_path / "out", "S")
    relying = [i for i, share in enumerate(shares[0].shares) if share >= limit]
    assert 0 < len(relying) < 4 and resolve(str(out)).manifest.facts["sinks"]["layers"] == relying
    assert resolve(str(out)).fitted_layers == tuple(relying)  # the layers whose sinks train
    read = tensor_reader(out)
    for layer in range(4):
        bare = (read(name_of(layer, "sinks")) == NO_SINK).all() and not read(name_of(layer, "v_proj.bias")).any()
        assert bare == (layer not in relying)


def test_a_fitted_conversion_is_its_own_teacher(model_dir, tmp_path, hangs):
    """Without what was fitted its weights are the source's, to the bit."""
    model = model_dir("llama")
    out, _ = convert(model, tmp_path / "out")
    loaded = load_model(out, device="cpu")
    with torch.no_grad():
        teacher = hidden_states(relayout(loaded.model, original_config(loaded.source)), IDS)
        assert torch.equal(teacher, hidden_states(load_model(model, device="cpu").model, IDS))
        assert not torch.equal(teacher, hidden_states(loaded.model, IDS))


def test_biases_of_the_source_cannot_be_taken_off_again(model_dir, tmp_path, hangs):
    out, _ = convert(model_dir("qwen2"), tmp_path / "out")
    with pytest.raises(InputError, match="differ from its source's") as caught:
        original_config(resolve(str(out)))
    assert "distill.teacher=SOURCE" in caught.value.hint


def test_what_is_said(model_dir, tmp_path, monkeypatch):
    model = model_dir("llama")
    _, said = convert(model, tmp_path / "none", gate=False)
    assert any("no sinks are needed" in line for line in said)
    _, said = convert(model, tmp_path / "other", model_class="auto", gate=False)
    assert not any("first token" in line for line in said)
    monkeypatch.setattr(fitted_sinks, "SINK_SHARE", 0.0)
    _, said = convert(model, tmp_path / "warned", model_class="auto", gate=False)
    (line,) = [line for line in said if "first token" in line]
    assert line.startswith("warning: ") and "--class granite_swa avoids it" in line
    _, said = convert(model_dir("qwen3"), tmp_path / "qwen3", "SSSN", model_class="auto", gate=False)
    assert any("first token" in line and "--class" not in line for line in said)
    # No window hides anything: nothing is measured.
    _, said = convert(model, tmp_path / "wide", model_class="auto", sliding_window=64, gate=False)
    assert not any("first token" in line for line in said)


def test_the_report_and_the_card_have_the_loss_without_and_with(model_dir, tmp_path, hangs):
    out, _ = convert(model_dir("llama"), tmp_path / "out")
    facts = resolve(str(out)).manifest.facts["sinks"]
    assert facts["layers"] == [0, 1] and {"loss_without", "loss_with", "first_token_share"} <= facts.keys()
    card = (out / "README.md").read_text()
    assert f"{facts['loss_without']:+.3f} without sinks, {facts['loss_with']:+.3f} with them" in card


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("qwen3", {}, "qwen3 cannot be converted to it: it normalises queries and keys"),
        ("qwen3", {"model_class": "smollm3"}, "allowed for qwen3: auto, mellum"),
        ("llama", {"model_class": "mellum"}, "allowed for llama: auto, smollm3, granite_swa"),
        ("llama", {"sinks": "4"}, "allowed are auto, none"),
    ],
)
def test_refusals(family, options, words, model_dir, tmp_path):
    with pytest.raises(InputError) as caught:
        convert(model_dir(family), tmp_path / "out", **options)
    assert words in f"{caught.value} {caught.value.hint}" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("scaling", ["auto", "yarn", "ntk"])
def test_it_trains_merges_is_verified_and_exported(scaling, model_dir, tmp_path, hangs):
    """Further than the source was trained, by each way that changes frequencies; a layer without RoPE stays so."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    out, _ = convert(model_dir("llama"), tmp_path / "out", "SSFN")
    settings = {"data.source": str(text), "global_batch_size": 1, "steps": 2, "rope_scaling": scaling}
    settings |= {"validation.every_steps": None, "attention.train": "s2", "attention.group_size": 32}
    api.finetune(out, ctx=128, out=tmp_path / "run", settings=settings)
    api.merge(tmp_path / "run", out=tmp_path / "merged")
    for attention in ("training", "inference"):
        assert verify(plan_launch(str(tmp_path / "run"), attention=attention, ctx=96), device="cpu").failed == ()
    api.export_model(tmp_path / "merged", out=tmp_path / "exported")
    loaded = load_model(tmp_path / "run", device="cpu").model
    with torch.no_grad():
        live, merged, exported = (
            model(IDS).logits for model in (loaded, stock(tmp_path / "merged"), stock(tmp_path / "exported"))
        )
    torch.testing.assert_close(merged, live, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged, exported)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    assert config["layer_rope_theta"] == [theta, theta, theta, 0]
    before, after = (tensor_reader(tmp_path / at)("model.layers.0.self_attn.sinks") for at in ("out", "merged"))
    assert not torch.equal(before, after)


def test_the_planner_measures_windows_with_their_sinks(model_dir, tmp_path, hangs):
    """What it says of its choice is what the fitted conversion loses, not what bare windows would."""
    options = {"full_layers": "auto", "budget": 2, "calibration_tokens": 128}
    found = {}
    for name in ("auto", "none"):
        _, said = convert(model_dir("llama"), tmp_path / name, "SF", sinks=name, **options)
        assert ("sliding layers are measured with fitted sinks" in said) == (name == "auto")
        found[name] = json.loads((tmp_path / name / "retrofit.json").read_text())
    assert found["auto"]["chosen"]["damage"]["text"] != found["none"]["chosen"]["damage"]["text"]
    request = ConvertRequest(
        model=str(model_dir("llama")), hybrid="SF", full_layers="auto", sliding_window=8, model_class="granite_swa"
    )
    plan = planned_conversion(request, None)
    window, source = LayerKind(True, 8), LayerKind(True, None)
    layers = fitted_sinks.open_conversion(plan, [window], torch.device("cpu"))
    with_sinks = replace(layers, values=fitted_sinks.sinks_of_windows(plan, layers, window))
    before = final_states(layers, IDS, [(source,) * 4])[(source,) * 4]
    # Full layers are the source's, whatever was fitted.
    assert torch.equal(before, final_states(with_sinks, IDS, [(source,) * 4])[(source,) * 4])
    assert not torch.equal(*(final_states(x, IDS, [(window,) * 4])[(window,) * 4] for x in (layers, with_sinks)))


def test_a_layer_called_by_itself_is_rotated_as_its_decoder_does(model_dir, tmp_path):
    """Healing calls layers one by one. This class rotates by whatever it gets: a layer without RoPE gets nothing."""
    out, _ = convert(model_dir("llama"), tmp_path / "out", "SFNS")
    decoder, given = load_model(out, device="cpu").model.get_decoder(), []
    for layer in decoder.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, _, named: given.append(named["position_embeddings"]), with_kwargs=True
        )
    with torch.no_grad():
        x = decoder.embed_tokens(IDS)
        decoder(input_ids=IDS, use_cache=False)
        ours = [rotations(decoder, x)(index) for index in range(4)]
    assert given[2] is None and ours[2] is None
    for index in (0, 1, 3):
        assert all(torch.equal(a, b) for a, b in zip(ours[index], given[index], strict=True))


def test_a_fitted_conversion_heals_from_itself(model_dir, tmp_path, hangs):
    """Every objective, with the teacher that has neither sinks nor biases."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    out, _ = convert(model_dir("llama"), tmp_path / "out", "SFNS")
    settings = {"data.source": str(text), "global_batch_size": 2, "steps": 3, "validation.every_steps": None}
    settings |= {"distill.objectives": [{"kl": 1.0, "hidden": 0.5, "attention": 0.5}], "optimizer.learning_rate": 1e-3}
    report = api.finetune(out, ctx=64, preset="heal", out=tmp_path / "run", settings=settings)
    assert report.finished
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


def test_they_are_fitted_on_text_that_is_given(model_dir, tmp_path, hangs):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    out, _ = convert(model_dir("llama"), tmp_path / "out", calibration=text)
    other, _ = convert(model_dir("llama"), tmp_path / "other")
    assert resolve(str(out)).manifest.facts["sinks"]["calibration"] == str(text)
    assert not torch.equal(*(tensor_reader(at)(name_of(0, "sinks")) for at in (out, other)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs at least 16"),
        ({"model_class": "smollm3"}, "needs --full-layers auto"),
        ({"sinks": "none"}, "needs --full-layers auto"),
        ({"layout": "F", "sliding_window": None}, "needs --full-layers auto"),
    ],
    ids=str,
)
def test_text_that_cannot_be_fitted_on_is_refused(options, words, model_dir, tmp_path, hangs):
    text = tmp_path / "text.txt"
    text.write_text("Short.")
    with pytest.raises(InputError) as caught:
        convert(model_dir("llama"), tmp_path / "out", calibration=text, **options)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def name_of(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj"]], ids=len)
def test_sinks_and_biases_train_at_their_own_rate(targets, model_dir, tmp_path, hangs):
    """They are counted, saved, found again by ctxext and by PEFT, and merged; those of full layers stay as they are."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    out, _ = convert(model_dir("llama"), tmp_path / "out", "SFNS")
    settings = {"data.source": str(text), "global_batch_size": 2, "steps": 2, "validation.every_steps": None}
    settings |= {"lora.target_modules": targets, "optimizer.learning_rate": 1e-9, "optimizer.warmup_steps": 0}
    settings |= {"optimizer.sinks_learning_rate": 0.01, "faults.keep_at_end": True}
    api.finetune(out, ctx=64, preset="heal", out=tmp_path / "run", settings=settings)
    api.merge(tmp_path / "run", out=tmp_path / "merged")
    # H = 8 sinks, K D = 4 x 8 and E = 64 biases in each of two layers.
    plan = plan_from_options(str(out), "heal", settings | {"ctx": 64}, needs_weights=True)
    sizes = {name: tensor_reader(out)(name_of(0, name)).numel() for name in FITTED}
    assert plan.trainables.sink_parameters == 2 * sum(sizes.values())
    before, after = tensor_reader(out), tensor_reader(tmp_path / "merged")
    for layer, slides in enumerate((True, False, False, True)):
        for name in FITTED:
            moved = (before(name_of(layer, name)) - after(name_of(layer, name))).abs().max().item()
            assert 1e-3 < moved < 0.03 if slides else moved == 0.0, (layer, name, moved)
    loaded = load_model(tmp_path / "run", device="cpu").model
    foreign = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), tmp_path / "run"
    )
    with torch.no_grad():
        live, peft, merged = (model(IDS).logits for model in (loaded, foreign.eval(), stock(tmp_path / "merged")))
    torch.testing.assert_close(peft, live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, live, rtol=1e-3, atol=1e-3)
    # The doctor misses one that is not there.
    assert [finding for finding in doctor.model(str(tmp_path / "run")) if finding.status == "failure"] == []
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    held = load_file(adapter)
    del held[next(name for name in held if name.endswith(".sinks"))]
    save_file(held, adapter, metadata={"format": "pt"})
    failed = [finding.found for finding in doctor.model(str(tmp_path / "run")) if finding.status == "failure"]
    assert any("1 trained tensors are not in" in found for found in failed), failed


def test_frozen_sinks_stay(model_dir, tmp_path, hangs):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    out, _ = convert(model_dir("llama"), tmp_path / "out", "SFNS")
    settings = {"data.source": str(text), "global_batch_size": 1, "steps": 2, "lora.sinks": "frozen"}
    api.finetune(out, ctx=64, out=tmp_path / "run", settings=settings | {"validation.every_steps": None})
    api.merge(tmp_path / "run", out=tmp_path / "merged")
    for name in FITTED:
        assert torch.equal(*(tensor_reader(tmp_path / at)(name_of(0, name)) for at in ("out", "merged")))


@pytest.mark.parametrize(("own", "window", "fitted"), [(16, 8, True), (8, 8, False), (8, 16, False)])
def test_a_source_with_windows_of_its_own(own, window, fitted, model_dir, tmp_path, hangs):
    """Where the source's layers do not see the first token either, nothing stands for it."""
    out, _ = convert(model_dir("mistral", sliding_window=own), tmp_path / "out", "S", sliding_window=window)
    logits = tensor_reader(out)("model.layers.0.self_attn.sinks")
    assert logits.isfinite().all() and bool((logits != NO_SINK).all()) == fitted
