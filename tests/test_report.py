"""The report: one HTML file that holds every number it was given, escapes what it was given, and loads nothing."""

import base64
import html
import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest

from ctxext.config import manifest as manifests
from ctxext.errors import CtxextError, DataError, InputError, ModelError
from ctxext.report.page import plan_report, write_report

LENGTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MODELS = {"tiny": 512, "tiny-swa128-nope-8k-merged": 8192, "tiny-8k-merged": 8192}  # name: usable length
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue", "vt", "cwe", "fwe")
EVERY = ("perplexity", "longppl", "passkey", "niah", "ruler", "longbench", "short")
LAYOUT, POSITIONS = "SNSN, window 128", "rope_theta 10000.0, rope_type default"
GRID = {"accuracy": 0.625, "answer_nats": 0.1} | {
    "cells": [{"length": 2048, "depth": depth, "accuracy": 0.5 + depth} for depth in (0.0, 0.25)]
}
VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """What a browser would see of a page: elements with their attributes, and the text; unbalanced markup fails."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    @property
    def numbers(self):
        return {attributes["value"] for attributes in self.all("data")}


def rows_of(suite: str, name: str, usable: int, lengths=LENGTHS, protocol: str = "", seed: int = 0) -> list[dict]:
    """Rows as an evaluation writes them, with numbers that stand nowhere else."""
    rng = random.Random(f"{suite} {name}")
    protocol = protocol or f"{suite}-protocol, stride 256, on held-out text, seed {seed}"

    def row(length, metric, value, n, task="", low=None, high=None, **details):
        beyond = length > usable
        given = {"suite": suite, "protocol": protocol, "task": task, "length": length, "metric": metric, "value": value}
        return given | {"n": n, "low": low, "high": high, "extrapolated": beyond, "details": details}

    rows = []
    for length in lengths if suite != "short" else (0,):
        fall = math.log2(max(length / usable, 1)) if usable else 0
        if suite in ("perplexity", "longppl"):
            value = (8 + rng.random()) * (2.2**fall)
            edges = [0, *[64 << i for i in range(20) if 64 << i <= length]]
            buckets = [
                {"start": a, "stop": b, "tokens": 100 + i, "nats_per_token": 3.2 - 0.1 * i + rng.random() / 20}
                for i, (a, b) in enumerate(pairwise(edges))
            ]
            more = {"bits_per_byte": value / 9, "windows": 63, "stride": length // 2, "buckets": buckets}
            keys = {"n_key": 150, "few_keys": length < 1000, "evaluator": "tiny", "short": 64}
            rows.append(row(length, suite, value, 16_384, **(more if suite == "perplexity" else keys)))
        elif suite in ("passkey", "niah"):
            shares = {str(depth): max(0.0, round(1 - 0.3 * fall - 0.2 * rng.random(), 1)) for depth in DEPTHS}
            share = sum(shares.values()) / 5
            low, high = max(0, share - 0.08 - rng.random() / 50), min(1.0, share + 0.09)
            facts = {"by_depth": shares, "seed": seed, "haystack": "held-out"}
            rows.append(row(length, "accuracy", share, 50, low=low, high=high, **facts))
        else:
            names = TASKS if suite == "ruler" else ("narrativeqa", "hotpotqa", "gov_report")
            scores = {task: min(100.0, max(0.0, 95 - 20 * fall - 12 * rng.random())) for task in names}
            scores = {task: score / 100 if suite == "short" else score for task, score in scores.items()}
            rows += [row(length, "score", score, 20, task=task) for task, score in scores.items()]
            facts = {"effective_length": 2048} if suite == "ruler" else {}
            rows.append(row(length, "score", sum(scores.values()) / len(scores), 20 * len(scores), **facts))
    return rows


def differences(suites, models) -> list[dict]:
    first, *others = models
    rng = random.Random("differences")
    return [
        {"suite": suite, "task": task, "length": length, "model": name, "against": first, "n": 60}
        | ({"unit": "nats per token"} if suite in ("perplexity", "longppl") else {"unit": "score from 0 to 1"})
        | (
            {"value": rng.random() / 50, "low": -rng.random(), "high": rng.random(), "p": rng.random()}
            if length == 512
            else {"value": (sign := -1 if suite in ("perplexity", "longppl") else 1) * rng.uniform(0.3, 0.5)}
            | {"low": sign * rng.uniform(0.1, 0.2), "high": sign * rng.uniform(0.6, 0.7), "p": rng.uniform(1e-4, 1e-3)}
        )
        | {"called": "no difference shown" if length == 512 else "better"}
        for name in others
        for suite in suites
        for length in (LENGTHS if suite != "short" else (0,))
        for task in ("", *(TASKS[:2] if suite == "ruler" else ()))
    ]


def evaluation(directory: Path, suites=EVERY, models=MODELS, weights="ab" * 32, change=None, **requested) -> Path:
    """An evaluation's directory; `change(results)` has the last word on what stands in it."""
    directory.mkdir(parents=True)
    spec = [{"suite": suite, "lengths": list(LENGTHS), "data": "embedded", **requested} for suite in suites]
    results = {
        "spec": {"suites": spec, "extrapolate": True, "dtype": "float32", "tokens_per_batch": 16_384},
        "seconds": 12.3,
        "models": [
            {"model": name, "path": f"/models/{name}", "usable_length": usable, "original_length": 512}
            | {"layout": LAYOUT, "positions": POSITIONS}
            | {"suites": [{"suite": s, "notes": [f"{s}: a note"], "rows": rows_of(s, name, usable)} for s in suites]}
            for name, usable in models.items()
        ],
        "differences": differences(suites, models) if len(models) > 1 else [],
        "added_later": 1,
    }
    if change:
        change(results)
    (directory / "results.json").write_text(json.dumps(results))
    parents = {
        f"model {i}": {"path": f"/models/{name}", "weights": {"model.safetensors": weights}}
        for i, name in enumerate(models)
    }
    command = ["ctxext", "eval", *models, "--lengths", "512,8k"]
    manifests.write(
        directory,
        manifests.new("eval", spec=results["spec"], parents=parents, facts={"longest": 8192}, command=command),
    )
    return directory


def training(directory: Path, name: str = "tiny-8k", steps: int = 40, seed: int = 7, extra=None) -> Path:
    """A finetune run's directory: what train/metrics.py and train/validation.py write, and two contexts."""
    directory.mkdir(parents=True)
    rng = random.Random(name)
    lines = [
        {"step": step, "loss": 3 - 0.8 * step / steps + rng.random() / 5, "learning_rate_factor": 1.0}
        | {"gradient_norm": 2 * rng.random() + 0.3, "gradient_scale": 1.0, "tokens": 16_384 * step}
        | {"tokens_per_second": 14_000 + 900 * rng.random(), "flops_per_second": 1e11, "memory": 2**30 + 2**21 * step}
        | {"seconds": 1.25}
        for step in range(1, steps + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checks = [
        {"step": step, "ctx": 2048 if step < steps / 2 else 8192, "loss": 2.9 - 0.5 * step / steps, "short": 2.8}
        | {"by_position": {str(at): 3.1 - 0.1 * i - step / 100 for i, at in enumerate((0, 64, 128, 256, 512, 1024))}}
        | (extra or {})
        for step in range(0, steps + 1, steps // 4)
    ]
    (directory / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in checks))
    facts = {"name": name, "layout": LAYOUT, "positions": "no interpolation needed", "usable_length": 8192}
    parents = {"base": {"path": "/models/tiny", "weights": {"model.safetensors": "cd" * 32}}}
    spec = {"ctx": 8192, "seed": seed, "steps": steps}
    manifests.write(directory, manifests.new("finetune", spec=spec, parents=parents, facts=facts, command=["ctxext"]))
    return directory


def report(*runs: Path, out: Path, title=None, force=False) -> Page:
    write_report(plan_report(list(runs), out=out, title=title, force=force))
    return Page((out / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(runs, directory of the report, page) of an evaluation with everything and of a training run."""
    place = tmp_path_factory.mktemp("full")
    runs = [evaluation(place / "eval"), training(place / "run")]
    return runs, place / "out", report(*runs, out=place / "out")


def floats(value):
    """Every float below a value of results.json."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from floats(inner)


def test_every_number_that_was_given_stands_on_the_page(full):
    (run, _), _, page = full
    results = json.loads((run / "results.json").read_text())
    given = {str(x) for key in ("models", "differences") for x in floats(results[key])}
    assert len(given) > 700 and given - page.numbers == set()
    for words in (LAYOUT, POSITIONS, "seed 0", "dtype float32", "a note", "few keys", "ab" * 6):
        assert words in page.text, words
    versions = manifests.versions()
    assert f"ctxext {versions['ctxext']}" in page.text and f"torch {versions['torch']}" in page.text


def test_the_document_is_one_that_screen_readers_and_browsers_like(full):
    _, _, page = full
    assert len(page.all("h1")) == 1 and page.all("html") == [{"lang": "en"}]
    assert not {"script", "link", "iframe", "object", "form"} & {name for name, _, _ in page.elements}
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.all("a")} == {f"#{id_}" for id_ in ids}
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 10
    for name, attributes, _ in page.elements:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        assert not any("//" in attributes.get(key, "") for key in ("src", "href", "style")) or name == "img"


def test_every_picture_is_embedded_as_it_stands_beside_the_page(full):
    _, out, page = full
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".svg", ".png")}
    embedded = []
    for image in page.all("img"):
        media, _, data = image["src"].removeprefix("data:").partition(";base64,")
        embedded.append(base64.b64decode(data, validate=True))
        assert media == ("image/png" if embedded[-1].startswith(b"\x89PNG") else "image/svg+xml")
        assert len(image["alt"]) > 20 and any(c.isdigit() for c in image["alt"])
    assert sorted(embedded) == sorted(files.values())
    assert {"perplexity-length.svg", "perplexity-position.svg", "passkey-depth-3.png", "niah-length.svg"} <= set(files)
    assert {"ruler-length.svg", "ruler-tasks-1.png", "longppl-length.svg"} <= set(files)
    curves = ("loss", "gradient-norm", "tokens-per-second", "memory", "held-out", "position")
    assert {f"training-{name}.svg" for name in curves} <= set(files)
    assert all(b"<text" not in data and b"http" not in _less_namespaces(data) for data in files.values())
    manifest = manifests.read(out)
    assert manifest.kind == "report" and manifest.facts["pictures"] == sorted(files)
    assert set(manifest.parents["run 1"]["files"]) == {"ctxext.json", "results.json"}


def _less_namespaces(data: bytes) -> bytes:
    return b"".join(line for line in data.splitlines() if b"xmlns" not in line and b"w3.org" not in line)


def test_what_lies_beyond_a_model_is_hollow_and_starred(tmp_path):
    def within(results):
        for model in results["models"]:
            for suite in model["suites"]:
                suite["rows"] = [row | {"extrapolated": False} for row in suite["rows"]]

    starred = report(evaluation(tmp_path / "a", ["perplexity"]), out=tmp_path / "beyond")
    page = report(evaluation(tmp_path / "b", ["perplexity"], change=within), out=tmp_path / "in")
    beyond, inside = ((tmp_path / name / "perplexity-length.svg").read_text() for name in ("beyond", "in"))
    assert beyond.count("fill: #ffffff; stroke: #0072b2") == 4 and "fill: #ffffff; stroke" not in inside
    assert "(beyond the usable length)" not in str(page.all("img"))
    # four lengths, in the table and among all numbers, and one of them in the summary
    assert (len(re.findall(r"\d\*", starred.text)), len(re.findall(r"\d\*", page.text))) == (9, 0)


def test_what_is_missing_is_said(tmp_path):
    def hole(results):
        rows = results["models"][0]["suites"][0]["rows"]
        rows[0] |= {"value": None, "low": None, "high": None}
        rows[1]["details"]["by_depth"]["0.5"] = None
        rows[4] |= {"value": math.inf}
        del results["models"][1]["suites"][0]["rows"][2]

    page = report(evaluation(tmp_path / "eval", ["passkey"], change=hole), out=tmp_path / "out")
    assert "none" in page.text and "not measured" in page.text and "inf*" in page.text
    assert "Not measured in these runs: Perplexity, LongPPL, Needle" in page.text
    assert "n is the number of items behind each number" in page.text
    depth = next(image["alt"] for image in page.all("img") if image["alt"].startswith("tiny: accuracy"))
    assert "0.5: " in depth and "none" in depth
    assert "Training" not in page.text


def test_names_from_files_cannot_break_the_page(tmp_path):
    name = "<script>alert('1')</script>&amp;\"$\\frac$\x00\u4e2d"

    def rename(results):
        results["models"][0] |= {"model": name, "layout": "<b>", "positions": "</td>", "path": "<i>"}
        results["models"][0]["suites"][0]["notes"] = ["</p><script>"]
        results["models"][1]["model"] = "_" + "long" * 60
        for row in results["models"][0]["suites"][0]["rows"]:
            row |= {"protocol": "</th><style>", "metric": "<u>"}
            row["details"]["<em>"] = "</table>"

    models = {"a": 512, "b": 8192}
    run = evaluation(tmp_path / "eval", ["passkey"], models, change=rename, data="<s>")
    other = training(tmp_path / "run", name=name)
    page = report(run, other, out=tmp_path / "out", title=f"{name}\udcff")  # as the shell gives a byte that is no text
    names = {element for element, _, _ in page.elements}
    assert not names & {"script", "b", "i", "u", "s", "em"} and len(page.all("style")) == 1
    shown = name.replace("\x00", "\ufffd")
    assert page.text.count(shown) > 10 and "</td>" in page.text and "</table>" in page.text


def test_an_unknown_suite_is_shown_and_names_no_file(tmp_path):
    def invent(results):
        results["spec"]["suites"][0]["suite"] = "../../own"
        for model in results["models"]:
            model["suites"][0]["suite"] = "../../own"

    page = report(evaluation(tmp_path / "eval", ["longppl"], change=invent), out=tmp_path / "out")
    assert "../../own" in page.text and {"id": "suite-1"} in page.all("h2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval", "out"]


def test_what_was_asked_apart_stands_apart(tmp_path):
    one = evaluation(tmp_path / "one", ["passkey"], {"tiny": 512}, seed=0)
    two = evaluation(tmp_path / "two", ["passkey"], {"tiny": 512, "long": 8192}, seed=0)
    three = evaluation(tmp_path / "three", ["passkey", "perplexity"], {"tiny": 512}, seed=1)
    four = evaluation(tmp_path / "four", ["perplexity"], {"tiny": 512}, weights="cd" * 32, seed=1)
    page = report(one, two, three, four, out=tmp_path / "out")
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*-length.svg"))
    assert pictures == ["passkey-1-length.svg", "passkey-2-length.svg", "perplexity-length.svg"]
    for words in ("tiny, run 1", "tiny, run 2", "long", "seed 1", "tiny (2)", "Run 4: eval"):
        assert words in page.text, words
    assert "tiny, run 3" not in page.text


def test_a_training_run(full, tmp_path):
    runs, out, page = full
    steps = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert {str(steps[0]["loss"]), str(steps[-1]["loss"])} <= page.numbers
    for words in ("655,360", "50 s", "1.1 GiB", "8,192", "step 40", "from 1,024"):
        assert words in page.text + str(page.all("img")), words
    assert not (out / "training-mfu.svg").exists()
    more = training(tmp_path / "more", extra={"passkey": GRID, "tail": {"p99": 0.375}, "note": "text"})
    lines = [json.loads(line) | {"mfu": 0.4} for line in (more / "metrics.jsonl").read_text().splitlines()]
    (more / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    page = report(runs[1], more, out=tmp_path / "out")
    assert (tmp_path / "out" / "training-mfu.svg").is_file() and "tail p99" in page.text
    assert {"0.625", "0.375"} <= page.numbers and (tmp_path / "out" / "training-passkey.svg").is_file()
    assert "tiny-8k, run 1" in page.text and "tiny-8k, run 2" in page.text and "Summary" not in page.text


def test_a_long_run_makes_no_long_page(tmp_path):
    report(training(tmp_path / "run", steps=6000), out=tmp_path / "out")
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.svg")) < 100_000


def test_other_outputs_are_shown_by_their_manifest(tmp_path):
    merged = tmp_path / "merged"
    merged.mkdir()
    manifests.write(
        merged, manifests.new("merge", spec={}, parents={}, facts={"name": "m", "gate": 0.25}, command=["x"])
    )
    page = report(merged, training(tmp_path / "run", steps=4), out=tmp_path / "out")
    assert "Run 1: merge, m" in page.text and "gate: 0.25" in page.text
    with pytest.raises(InputError, match=r"nothing to report in .*merged \(a merge\)") as refused:
        plan_report([merged], out=tmp_path / "none", title=None, force=False)
    assert "eval, a probe or a finetune" in refused.value.hint


def test_the_same_runs_give_the_same_bytes(tmp_path):
    runs = [evaluation(tmp_path / "eval", ["passkey"], {"tiny": 512}), training(tmp_path / "run", steps=8)]
    for name in ("one", "two"):
        report(*runs, out=tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        if path.name != "ctxext.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def broken(change):
    return lambda place: evaluation(place / "eval", ["passkey"], change=change)


def set_value(value):
    def change(results):
        results["models"][0]["suites"][0]["rows"][0] |= value

    return change


def file_with(kind: str, name: str, text: str):
    def make(place):
        directory = training(place / "eval") if kind == "training" else evaluation(place / "eval", ["passkey"])
        (directory / name).write_text(text)
        return directory

    return make


def without(kind: str, name: str):
    def make(place):
        directory = training(place / "eval") if kind == "training" else evaluation(place / "eval", ["passkey"])
        (directory / name).unlink()
        return directory

    return make


REFUSED = [
    (lambda place: place / "nowhere", InputError, "no such directory"),
    (without("evaluation", "ctxext.json"), InputError, "not an output of ctxext"),
    (without("evaluation", "results.json"), InputError, "has no results.json"),
    (without("training", "metrics.jsonl"), InputError, "has no metrics.jsonl"),
    (file_with("evaluation", "ctxext.json", "{"), ModelError, "broken"),
    (file_with("evaluation", "results.json", "{"), DataError, "does not hold"),
    (file_with("evaluation", "results.json", '{"request": {}}'), DataError, "models: Field required"),
    (file_with("training", "metrics.jsonl", 'x\n{"step": 1}\n'), DataError, "metrics.jsonl:1"),
    (file_with("training", "metrics.jsonl", '{"loss": 1}\n'), DataError, "metrics.jsonl:1"),
    (file_with("training", "metrics.jsonl", '{"step": 1, "loss": "low"}\n'), DataError, "loss: Input should be"),
    (file_with("training", "validation.jsonl", '{"step": 1, "by_position": {"a": 1}}\n'), DataError, "by_position"),
    (broken(set_value({"value": "high"})), DataError, "models.0.suites.0.rows.0.value"),
    (broken(set_value({"details": {"by_depth": {"0.0": "all"}}})), DataError, "by_depth"),
    (broken(set_value({"details": {"buckets": [{"start": 0}]}})), DataError, "buckets"),
    (broken(lambda results: results["models"][0]["suites"].clear()), DataError, "suites of tiny"),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_refusals_name_the_place_and_write_nothing(make, error, words, tmp_path):
    directory = make(tmp_path)
    with pytest.raises(error) as raised:
        plan_report([directory], out=tmp_path / "out", title=None, force=False)
    assert words in raised.value.message and str(directory) in raised.value.message
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_one_given_twice_and_an_out_that_exists(tmp_path):
    run = training(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(InputError, match="given twice"):
        plan_report([run, tmp_path / "link"], out=None, title=None, force=False)
    for force in (False, True):  # never over what is being read
        with pytest.raises(CtxextError, match="run"):
            plan_report([run], out=run, title=None, force=force)
    (run / "ctxext.json").unlink()
    (run / "spec.yaml").write_text("")
    with pytest.raises(InputError, match="not finished"):
        plan_report([run], out=None, title=None, force=False)


def test_the_command(tmp_path):
    run = evaluation(tmp_path / "eval", ["passkey"], {"tiny": 512})
    code = (
        "import sys; from ctxext.cli import main\ntry: main()\nfinally: sys.stderr.write(str('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", code, "report", str(run), "--title", "Mine"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "False", done.stderr
    written = json.loads(done.stdout)
    assert written["models"] == ["tiny"] and len(written["pictures"]) == 2
    assert Page((tmp_path / written["page"]).read_text("utf-8")).all("title") and "-report-tiny" in written["out"]
    done = subprocess.run([*command, "--out", str(run)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "exists" in done.stderr and done.stdout == ""


WIDTHS = (360, 1600)
MEASURE = """<!doctype html><title>measuring</title>%s<pre id="found"></pre><script>
addEventListener("load", () => { document.getElementById("found").textContent = JSON.stringify(
  [...document.querySelectorAll("iframe")].map(frame => { const page = frame.contentDocument; return {
    width: frame.clientWidth, scroll: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight,
    images: [...page.images].map(image => image.naturalWidth), shown: [...page.images].map(image => image.clientWidth),
  } })) })</script>"""


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium on the PATH: what the report looks like in a browser is NOT tested")
    return [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]


@pytest.mark.slow
def test_a_browser_shows_it(full, browser, tmp_path):
    """The page as it is: no complaint on the console, not blank; in frames of two widths: every picture is there, and
    nothing but tables scrolls sideways."""
    from matplotlib.image import imread

    page, profile = full[1] / "report.html", [f"--user-data-dir={tmp_path / 'profile'}"]
    shot = [f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1600,1200", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run([*browser, *profile, *shot, f"file://{quote(str(page))}"], capture_output=True, timeout=120)
    assert done.returncode == 0 and b"CONSOLE" not in done.stderr, done.stderr.decode()
    pixels = imread(tmp_path / "shot.png")[..., :3].reshape(-1, 3)
    assert len(set(map(tuple, pixels[::97].round(2).tolist()))) > 30
    frames = "".join(
        f'<iframe width="{w}" height="900" srcdoc="{html.escape(page.read_text("utf-8"))}"></iframe>' for w in WIDTHS
    )
    (tmp_path / "measure.html").write_text(MEASURE % frames, "utf-8")
    command = [*browser, *profile, "--dump-dom", f"file://{tmp_path / 'measure.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = done.stdout.rpartition('<pre id="found">')[2].partition("</pre>")[0]
    for found in json.loads(html.unescape(text)):
        assert len(found["images"]) == len(full[2].all("img")) and min(found["images"]) > 0
        assert found["scroll"] <= found["width"] and min(found["shown"]) >= 300, found
