"""A run on a tiny model: its folder, its resumption, its comparison, its page in a real browser."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dit_sparse.eval import evaluation
from dit_sparse.eval.config import parse_config
from dit_sparse.eval.evaluation import EvaluationWork, digest, evaluate, jobs_of
from dit_sparse.eval.measures.table import coverage
from dit_sparse.eval.report import page, write_report
from dit_sparse.eval.results import compare_runs, load_evaluation
from dit_sparse.eval.tables import speed
from tests.browser import find_browser
from tests.tiny_wan import build_tiny_wan

SHAPE = {"frames": 5, "height": 64, "width": 64, "steps": 2, "guidance_scale": 1.0}
PROMPTS = [f"a {colour} circle moving left on a black background" for colour in ("red", "green", "blue")]
CONFIG = parse_config({
    "pipeline": "tiny", "prompts": PROMPTS, "clips": 2, "attention": 1,
    "methods": ["svg", {"name": "radial", "label": "radial-1", "options": {"decay": 1.0, "dense_steps": 0}}],
    "measures": ["psnr", "ssim", "flicker_difference", "temporal_flickering", "world_color", "ms_ssim"],
})


@pytest.fixture(scope="module")
def pipe():
    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    place = tmp_path_factory.mktemp("run")
    evaluate(CONFIG, SHAPE, pipe, place, command="dit-sparse eval run <tiny>.yaml")
    return place


def test_a_run_leaves_everything(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {
        "results.jsonl", "attention.jsonl", "run.json", "environment.json", "report.html", "videos"
    }
    assert len(list((folder / "videos").rglob("*.mp4"))) == 3 * 3
    run = load_evaluation(folder)
    assert run.labels == ["dense", "svg", "radial-1"] and run.planned == len(run.entries) == 9
    dense, svg = (run.of(label)[0]["result"] for label in ("dense", "svg"))
    assert "psnr" not in dense["values"] and 0 < svg["values"]["psnr"] <= 100
    assert len(svg["latent_errors"]) == 2 and dense["latent_errors"] == []
    # the untouched model's attention, from two timed steps: the same operations as the dense equivalent
    assert dense["flops_computed"] == dense["flops_dense_equivalent"] == svg["flops_dense_equivalent"]
    assert dense["attention_seconds"] > 0
    assert svg["flops_computed"] == pytest.approx(svg["density"] * svg["flops_dense_equivalent"])
    assert {layer: set(row) for layer, row in svg["density_map"].items()} == {"0": {"0", "1"}, "1": {"0", "1"}}
    means = {layer: sum(row.values()) / len(row) for layer, row in svg["density_map"].items()}
    assert means == pytest.approx(svg["per_layer"], abs=1e-3)
    assert set(svg["per_layer"]) == {"0", "1"} and "161 pixels" in svg["reasons"]["ms_ssim"]
    assert json.loads((folder / "environment.json").read_text())["torch"]


def test_a_killed_run_goes_on(folder: Path, pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    # three clips are done, the fourth (dense of the second prompt) and half a line of the fifth
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    made = []
    work = EvaluationWork._make
    monkeypatch.setattr(EvaluationWork, "_make", lambda self, job, label, key: made.append(label) or work(
        self, job, label, key))
    results = evaluate(CONFIG, SHAPE, pipe, tmp_path, command="again")
    # the dense clip is made once more: its file is not what the model made
    assert made == ["dense", "svg", "radial-1", "dense", "svg", "radial-1"]
    first = [json.loads(line)["result"] for line in lines]
    for again, before in zip(results, first, strict=True):
        assert again["values"] == before["values"] and again["latent_errors"] == before["latent_errors"]


def test_attention_is_looked_into_once(folder: Path, pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_evaluation(folder)
    assert set(run.attention) == {"svg", "radial-1"} and run.looked == run.planned_looks == 2
    # two layers, two steps; svg leaves the first step and the first layer dense
    kinds = {(c["layer"], c["step"]): c["kind"] for c in run.attention["svg"]}
    assert kinds == {(0, 0): "dense", (0, 1): "dense", (1, 0): "dense", (1, 1): "sparse"}
    shutil.copytree(folder, tmp_path / "again")
    lines = (folder / "attention.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "again" / "attention.jsonl").write_bytes(lines[0] + lines[1][:100])
    text = write_report(tmp_path / "again").read_text()
    assert "attention of 1 clips is not looked into yet" in text
    looked = []
    work = evaluation.AttentionWork.__call__
    monkeypatch.setattr(evaluation.AttentionWork, "__call__", lambda self, job: looked.append(job["label"]) or work(
        self, job))
    evaluate(CONFIG, SHAPE, pipe, tmp_path / "again", command="again")
    assert looked == ["radial-1"]
    assert (tmp_path / "again" / "attention.jsonl").read_bytes() == b"".join(lines)


def test_an_unfinished_run_can_be_looked_at(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "part")
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part" / "results.jsonl").write_bytes(b"".join(lines[:2]))
    shutil.rmtree(tmp_path / "part" / "videos" / "svg")
    text = write_report(tmp_path / "part").read_text()
    assert "7 of 9 clips are missing" in text


def test_the_table_of_speed_keeps_computed_and_dense_equivalent_apart(folder: Path) -> None:
    run = load_evaluation(folder)
    rows = [dict(zip(speed(run).columns, row, strict=True)) for row in speed(run).rows]
    assert [row["method"] for row in rows] == ["dense", "svg", "radial-1"]
    for row in rows:
        assert row["seconds a step"] == pytest.approx(row["seconds a clip"].mean / 2) and row["fallbacks"] == 0
        done, dense = (float(row[f"attention TFLOP {name}"]) for name in ("computed", "dense-equivalent"))
        assert done == pytest.approx(dense * row["density"].mean, rel=1e-2)
        assert row["in attention"].endswith(" %")
    assert [row["in masks"] is None for row in rows] == [True, False, False]
    assert {"peak memory", "speed-up"} <= set(rows[0])
    # bytes are told where a GPU counted them
    for entry in run.of("svg"):
        entry["result"]["peak_bytes"] = 3 * 2**29
    at = speed(run).columns.index("peak memory")
    assert [row[at] for row in speed(run).rows] == [None, "1.50 GiB", None]


def test_other_settings_are_other_jobs(tmp_path: Path) -> None:
    keys = {json.dumps(job, sort_keys=True) for job in jobs_of(CONFIG, SHAPE)}
    assert len(keys) == 9
    other = parse_config({**CONFIG.to_dict(), "methods": [{"name": "svg", "options": {"density": 0.5}}]})
    dense_only = {json.dumps(job, sort_keys=True) for job in jobs_of(other, SHAPE)} & keys
    assert len(dense_only) == 3
    assert not {json.dumps(job, sort_keys=True) for job in jobs_of(CONFIG, SHAPE, "other weights")} & keys
    (tmp_path / "a").write_text("1")
    one = digest(tmp_path)
    (tmp_path / "a").write_text("2")
    assert one != digest(tmp_path) and digest("owner/name") == ""


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run.json cannot be read: .*; give a folder"):
        load_evaluation(tmp_path)
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        load_evaluation(tmp_path / "run")
    with pytest.raises(ValueError, match="has no method 'magic'; use one of dense, svg"):
        compare_runs(f"{folder}:magic", f"{folder}:svg")
    with pytest.raises(ValueError, match="is no folder"):
        compare_runs("nowhere", str(folder))


def made_run(place: Path, shift: float, noise: float, prompts: int = 12) -> Path:
    """A folder of a run that never happened: PSNR 30 plus a shift, the same noise for each prompt."""
    place.mkdir()
    lines, keys = [], []
    for i in range(prompts):
        job = {"prompt": f"p{i}", "seed": 0, "label": "svg"}
        value = 30 + 5 * (i % 4) + shift + noise * (-1) ** i
        result = {"values": {"psnr": value, "sharpness_drift": shift}, "reasons": {}, "seconds": 2.0, "density": 0.3}
        keys.append(evaluation.job_key(job))
        lines.append(json.dumps({"key": keys[-1], "job": job, "result": result}))
    (place / "results.jsonl").write_text("\n".join(lines) + "\n")
    (place / "run.json").write_text(json.dumps({"command": "", "config": {"prompts": [], "seeds": [0]}, "jobs": keys}))
    (place / "environment.json").write_text("{}")
    return place


def test_comparison_is_paired(tmp_path: Path) -> None:
    a, b, c = (made_run(tmp_path / n, s, z) for n, s, z in (("a", 0, 0), ("b", 0.5, 0.1), ("c", 0.01, 0.5)))
    by_name = {d.name: d for d in compare_runs(str(a), str(b))}
    # prompts differ by far more than the methods: only pairs show it
    assert by_name["psnr"].says == "higher" and by_name["psnr"].better == "B"
    assert by_name["sharpness_drift"].better == "A"
    assert by_name["seconds"].says == "within noise" and by_name["density"].better == ""
    assert {d.name: d for d in compare_runs(str(a), str(c))}["psnr"].says == "within noise"
    few = made_run(tmp_path / "few", 1, 0, prompts=3)
    assert {d.says for d in compare_runs(str(a), str(few))} == {"too few prompts"}


def test_frozen_clips_never_win(tmp_path: Path) -> None:
    """B flickers less and is smoother because it moves less: nothing is better, and the note says why."""
    a, b = (made_run(tmp_path / name, 0, 0) for name in ("a", "b"))
    for place, flickering, motion in ((a, 0.95, 0.5), (b, 1.0, 0.0)):
        lines = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
        for line in lines:
            line["result"]["values"] |= {"temporal_flickering": flickering, "motion_magnitude_proxy": motion}
        (place / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {d.name: d for d in compare_runs(str(a), str(b))}
    assert rows["temporal_flickering"].says == "higher" and rows["motion_magnitude_proxy"].says == "lower"
    assert rows["temporal_flickering"].better == "" and rows["temporal_flickering"].note == "B moves less"
    back = {d.name: d for d in compare_runs(str(b), str(a))}["temporal_flickering"]
    assert (back.says, back.better, back.note) == ("lower", "", "A moves less")


def test_two_methods_of_a_run_are_compared(folder: Path) -> None:
    found = compare_runs(f"{folder}:svg", f"{folder}:radial-1")
    assert {d.label for d in found} == {"svg / radial-1"} and {"psnr", "seconds"} <= {d.name for d in found}
    assert all(d.difference.mean == 0 for d in compare_runs(str(folder), str(folder)))


def test_page_is_self_contained_and_escaped(folder: Path) -> None:
    text = page(load_evaluation(folder))
    assert "dit-sparse eval run &lt;tiny&gt;.yaml" in text and "<tiny>" not in text
    links = re.findall(r"(?:src|href|srcset|action)\s*=\s*['\"]([^'\"]{0,40})", text)
    assert links and all(link.startswith("data:") for link in links)
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert all(f"<td>{row.dimension}</td>" in text for row in coverage())
    assert "What was not measured" in text and "161 pixels" in text
    for part in ("Speed against fidelity", "Density by layer", "Density by layer and step", "Quality by dimension",
                 "Attention against dense attention", "Clips"):
        assert f"<h2>{part}</h2>" in text


PROBE = """<script>window.bad = [];
addEventListener('error', e => bad.push(String(e.message || e.target.tagName)), true);
addEventListener('securitypolicyviolation', e => bad.push('policy ' + e.blockedURI));
addEventListener('load', () => setTimeout(() => {
  const seen = e => { const r = e.getBoundingClientRect(); return r.width > 20 && r.height > 20; };
  const all = (q, ok) => [...document.querySelectorAll(q)].map(e => ok(e) && seen(e));
  const out = {bad, images: all('img', e => e.complete && e.naturalWidth > 0), charts: all('svg', e => true),
    videos: all('video', e => e.readyState >= 1 && e.videoWidth > 0), tables: all('table', e => true).length,
    wide: document.documentElement.scrollWidth > innerWidth};
  const p = document.createElement('pre'); p.id = 'probe'; p.textContent = JSON.stringify(out);
  document.body.appendChild(p); }, 1500));</script>"""


def headless(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000",
               "--window-size=1100,2600", *words]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120,
                          env={**os.environ, "HOME": str(folder)})


def test_page_in_a_browser(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    text = (folder / "report.html").read_text(encoding="utf-8")
    # The page itself allows no script: the copy that looks at it does.
    probed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';", 1)
    file.write_text(probed.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    done = headless(tmp_path, "--dump-dom", file.as_uri())
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-500:]
    seen = json.loads(found[1].replace("&amp;", "&"))
    assert seen["bad"] == []
    assert len(seen["images"]) == len(seen["videos"]) == 2 and all(seen["images"] + seen["videos"])
    # four of the whole run, and of each method density by layer and step, recall by step and by head
    assert len(seen["charts"]) == 4 + 2 * 3 and all(seen["charts"]) and seen["tables"] >= 4 and not seen["wide"]
    # The page as it is: no messages in its console, and a picture that is no blank sheet.
    done = headless(tmp_path, f"--screenshot={tmp_path / 'page.png'}", (folder / "report.html").as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr[-500:]
    from PIL import Image

    colours = Image.open(tmp_path / "page.png").convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None and len(colours) > 50
