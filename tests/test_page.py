"""The page of a study and of any runs: its data, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from lml import configs, report
from lml.correction import METHOD_VERSION
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.report import page, results, tables
from lml.report.paper import Published
from lml.runs.store import RunFolder
from lml.seals import sealed, settings_hash

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>{{chart}}"
LML = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/lml/default.yaml"))


@pytest.fixture
def make_run(tmp_path):
    """`make_run(rank, nfe, seed, …)` leaves a finished run of noise in outputs/study."""

    def make(rank=0, nfe=5, seed=0, value=1.0, images=9, solver="ddim", name=None, side=8) -> Path:
        config = {
            "model": {"name": "cifar10"},
            "solver": OmegaConf.to_container(configs.option("solver", solver)),
            "grid": {"name": "default"},
            "lml": {**LML, "rank": rank},
            **{"nfe": nfe, "seed": seed, "num_images": images, "dtype": "float32"},
        }
        settings = {**config, "model": {"network": "abc"}, "method_version": METHOD_VERSION}
        path = tmp_path / "outputs/study" / (name or settings_hash(settings)[:10])
        run = RunFolder(path, settings)
        run.open({**config, "provenance": {"command": f"python sample.py seed={seed}"}})
        for i in range(images):
            random = np.random.default_rng([seed + i, nfe, rank])
            run.write_image(i, random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        run.write_manifest(images)
        run.close()
        score = {"value": value, "protocol": {"extractor": "e"}}
        path.joinpath("metrics.json").write_text(json.dumps({"fd": sealed(score, run.hash, "fd")}))
        return path

    return make


def made(*runs: Path, title: str = "study") -> str:
    """The page of these runs."""
    folders, said = {run.name: run for run in runs}, []
    known = [result for run in runs for result in results.read_run(run, said.append)]
    shown = [(tables.build("fd", known), known)]
    return page.render(title, known, shown, folders, ["python x.py"], said)


def data_of(text: str) -> dict:
    """What is in the page's JSON."""
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found)


def pixels_of(sample: dict) -> np.ndarray:
    raw = base64.b64decode(sample["url"].removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


# --- data --------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_table(make_run):
    runs = [make_run(rank, nfe, seed, value=nfe + rank + seed / 1e3)
            for rank in (0, 2) for nfe in (5, 6) for seed in (0, 100)]  # fmt: skip
    (metric,) = data_of(made(*runs))["metrics"]
    assert (metric["columns"], metric["higher"], len(metric["rows"])) == ([5, 6], False, 2)
    off, default = metric["rows"]
    assert (off["solver"], off["grid"], off["lml"]) == ("DDIM", "default grid", "off")
    cell = default["cells"]["6"]
    assert cell["mean"] == pytest.approx(8.05) and cell["std"] == pytest.approx(0.0707, abs=1e-4)
    assert cell["change"].startswith("+33.") and cell["text"] == "8.050 ± 0.071"
    assert [value for _, _, value in cell["runs"]] == [8.0, 8.1]
    assert {run for run, _, _ in cell["runs"]} == {runs[6].name, runs[7].name}
    assert "extractor e" in metric["caption"]


def test_times_have_a_unit_and_no_winner():
    same = {"model": "m", "model_sha256": "", "size": "", "solver": "ddim", "grid": "default"}
    same |= {"solver_options": '{"scheduler":{},"step":{}}', "nfe": 5, "num_images": 1}
    same |= {"dtype": "float32", "protocol": "", "steps": "", "warning": ""}
    known = [
        results.Result(
            run=f"{rank}{seed}", seed=seed, lml=json.dumps({**LML, "rank": rank}),
            metric="timing/network", value=1 + rank + seed / 100, images_per_second=1.0, **same,
        )
        for rank in (0, 2) for seed in (0, 1)
    ]  # fmt: skip
    shown = [(tables.build("timing/network", known), known)]
    (metric,) = data_of(page.render("study", known, shown, {}, [], []))["metrics"]
    assert metric["name"] == "network, ms per image and evaluation"
    assert not any(cell["bold"] for row in metric["rows"] for cell in row["cells"].values())


def test_the_samples_are_the_images(make_run):
    run = make_run(images=9)
    (sample,) = data_of(made(run))["samples"]
    assert (sample["count"], sample["width"], sample["height"]) == (9, 64, 16)
    sprite = pixels_of(sample)
    for k in range(9):
        image = np.asarray(Image.open(run / f"images/{k:06d}.png"))
        top, left = k // 8 * 8, k % 8 * 8
        assert (sprite[top : top + 8, left : left + 8] == image).all()


def test_a_run_that_is_not_called_by_its_hash_has_it_beside_its_name(make_run):
    run = make_run()
    assert data_of(made(run))["hashes"] == {}
    other = run.rename(run.with_name("mine"))
    assert data_of(made(other))["hashes"] == {"mine": run.name}


def test_at_most_64_images_and_large_ones_are_shrunk(make_run):
    (sample,) = data_of(made(make_run(images=65)))["samples"]
    assert (sample["count"], sample["width"], sample["height"]) == (64, 64, 64)
    (sample,) = data_of(made(make_run(images=1, side=256)))["samples"]
    assert (sample["width"], sample["height"]) == (128, 128)


@pytest.mark.parametrize(("limit", "least", "most"), [(40_000, 8, 24), (3_000, 1, 2)])
def test_fewer_images_where_they_do_not_fit(make_run, monkeypatch, limit, least, most):
    """64 images of 8x8 pixels of noise are about 17 kB."""
    monkeypatch.setattr(page, "SPRITES", limit)
    samples = data_of(made(*(make_run(seed=100 * k, images=64) for k in range(6))))["samples"]
    counts = {sample["count"] for sample in samples}
    assert len(samples) == 6 and len(counts) == 1 and least <= counts.pop() <= most
    assert limit / 2 < sum(len(sample["url"]) for sample in samples) <= limit


def test_what_has_no_place_is_said(make_run, monkeypatch):
    monkeypatch.setattr(page, "SPRITES", 1000)
    found = data_of(made(*(make_run(seed=100 * k) for k in range(6))))
    assert 1 <= len(found["samples"]) < 6
    assert f"samples of {6 - len(found['samples'])} runs had no place" in " ".join(found["notes"])


def test_of_many_runs_the_samples_of_one_seed(make_run, monkeypatch):
    monkeypatch.setattr(page, "RUNS", 3)
    runs = [make_run(seed=seed, rank=rank) for seed, rank in [(0, 0), (7, 0), (7, 2), (9, 0)]]
    assert {s["seed"] for s in data_of(made(*runs[:3]))["samples"]} == {0, 7}
    assert [s["seed"] for s in data_of(made(*runs))["samples"]] == [7, 7]


def test_images_that_are_gone_or_edited_are_no_samples(make_run):
    gone, edited, whole = (make_run(seed=100 * k) for k in range(3))
    shutil.rmtree(gone / "images")
    Image.new("RGB", (8, 8)).save(edited / "images/000003.png")
    found = data_of(made(gone, edited, whole))
    assert [sample["run"] for sample in found["samples"]] == [whole.name]
    assert any("000003.png was edited" in note for note in found["notes"])
    assert {row["lml"] for row in found["metrics"][0]["rows"]} == {"off"}


def test_nothing_in_a_run_is_read_as_html(make_run):
    run = make_run()
    other = run.rename(run.with_name(EVIL.replace("/", "\u2215")))
    text = made(other, title=EVIL)
    assert text.count("<script") == 3 and "<img src=x" not in text
    assert data_of(text)["title"] == EVIL and data_of(text)["samples"][0]["run"] == other.name
    assert text.count("uPlot=function") == 1  # {{chart}} of the name is not replaced


def test_a_page_is_the_same_bytes_again(make_run):
    runs = [make_run(rank=rank) for rank in (0, 2)]
    assert made(*runs) == made(*runs)


def test_a_page_asks_for_nothing(make_run):
    text = made(make_run())
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\((?!#)""", text)


# --- the scripts -------------------------------------------------------------------------------


def test_a_study_has_a_page_and_keeps_it_without_its_runs(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(rank=rank) for rank in (0, 2)]
    keys = ("runs", "out", "show", "evaluations")
    cfg = OmegaConf.create({"name": "study", **dict.fromkeys(keys)})
    index = report.tabulate(cfg) / "index.html"
    first = data_of(index.read_text())
    assert {s["run"] for s in first["samples"]} == {run.name for run in runs}
    shutil.rmtree(tmp_path / "outputs")
    report.tabulate(cfg)
    second = data_of(index.read_text())
    assert second["samples"] == [] and second["metrics"] == first["metrics"]


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("experiments/*/index.html")), ids=lambda file: file.parent.name
)
def test_the_page_of_a_committed_study_is_todays(file):
    template = (page.HERE / "page.html").read_text()
    text = file.read_text()
    for part in re.split(r"{{\w+}}", template):
        assert part in text


def test_any_runs_make_a_page(script, make_run, tmp_path):
    for k, name in enumerate(("a", "b")):
        make_run(seed=k, name=name)
    make_run(name="x/a", value=2.0)
    runs = [f"outputs/study/{name}" for name in ("a", "b", "x/a", "nothing")]
    outcome = script("compare", *runs, "out=pages/new.html")
    assert (outcome.code, outcome.out) == (0, "pages/new.html\n")
    assert outcome.err.startswith("outputs/study/nothing: no complete run")
    found = data_of((tmp_path / "pages/new.html").read_text())
    assert [sample["run"] for sample in found["samples"]] == [runs[0], runs[2], "b"]
    assert found["commands"] == ["python sample.py seed=0", "python sample.py seed=1"]
    # its own page may be replaced
    listed = script("compare", "run_dirs=[outputs/study/b]", "out=pages/new.html")
    assert (listed.code, listed.err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run_dirs: no complete run"),
        ([], "run_dirs=???: a value is needed"),
        (["a", "out=mine.html"], "out=mine.html: is there and no page"),
        (["a", "out=."], "out=.: "),
        (["a", "show=fdd"], "show=fdd: in none of the runs"),
        (["run_dirs=[7]"], "run_dirs.0=7: expected a path"),
    ],
)
def test_bad_input_is_one_line(script, make_run, tmp_path, arguments, message):
    make_run().rename(tmp_path / "a")
    (tmp_path / "mine.html").write_text("mine")
    outcome = script("compare", *arguments)
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith(message)
    assert outcome.err.count("\n") == 1
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_no_run_is_a_page(make_run):
    cfg = OmegaConf.create({"run_dirs": ["x"], "out": str(make_run() / "grid.png"), "show": None})
    with pytest.raises(UserError, match="among the files of the run"):
        report.compare(cfg)


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    reason = "needs Playwright and Chromium (pip install playwright; apt-get install chromium)"
    sync = pytest.importorskip("playwright.sync_api", reason=reason)
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip(reason)
    with sync.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def opened(browser, make_run, tmp_path):
    """The page of 16 runs, one of them with a name to break out of; fails on any console error."""
    runs = [
        make_run(rank, nfe, value=value, solver=solver, images=64)
        for value, (solver, rank, nfe) in enumerate(
            [(s, r, n) for s in ("ddim", "dpmsolverpp") for r in (0, 2) for n in (5, 6, 8, 10)], 1
        )
    ]
    runs[0] = runs[0].rename(runs[0].with_name(EVIL.replace("/", "\u2215")))
    file = tmp_path / "page.html"
    file.write_text(made(*runs, title=EVIL))
    said = []
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url) if "http" in request.url else 0)
        tab.goto(file.as_uri())
        yield tab
        assert said == []


def test_it_opens_and_nothing_of_the_data_is_run(opened):
    assert opened.title() == EVIL and opened.locator("h1").inner_text() == EVIL
    assert opened.locator("body img").count() == 2
    timing = opened.evaluate("performance.timing.domComplete - performance.timing.responseEnd")
    assert timing < 5000  # 0.2 s on a quiet machine


def test_a_line_is_switched_off_and_on(opened):
    shown = "chart.series.slice(1).map((line) => line.show)"
    line = opened.get_by_role("button", name="DDIM, LML default", exact=True)
    assert opened.evaluate(shown) == [True] * 4
    line.click()
    assert opened.evaluate(shown) == [True, False, True, True]
    assert line.get_attribute("aria-pressed") == "false"
    line.press("Enter")
    assert opened.evaluate(shown) == [True] * 4
    opened.get_by_label("DPM-Solver++(3M)", exact=True).uncheck()
    assert opened.evaluate(shown) == [True, True, False, False]


def test_another_group_has_lines_too(browser, make_run, tmp_path):
    """Even where it has none of the settings that the first group shows."""
    runs = [make_run(images=9), *(make_run(2, nfe=5 + k, images=4) for k in range(2))]
    (tmp_path / "page.html").write_text(made(*runs))
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto((tmp_path / "page.html").as_uri())
        for group in ("4 images", "9 images"):
            tab.locator("#group").select_option(group)
            assert tab.evaluate("chart.series.slice(1).map((line) => line.show)") == [True]


def test_a_value_is_seen_on_hover(opened):
    x, y = opened.evaluate("[chart.valToPos(8, 'x'), chart.valToPos(7, 'y')]")
    opened.locator(".u-over").hover(position={"x": x, "y": y})
    tip = opened.locator("#tip").inner_text()
    assert "DDIM, LML default" in tip and "7.000 at 8 evaluations" in tip
    assert "+133.3 %" in tip


def test_the_slider_wipes(opened):
    edge = "getComputedStyle(document.getElementById('right')).clipPath"
    assert "50%" in opened.evaluate(edge)
    slider = opened.get_by_role("slider")
    slider.fill("20")
    assert "20%" in opened.evaluate(edge)
    slider.press("ArrowRight")
    assert "21%" in opened.evaluate(edge)
    opened.locator("#stack").click(position={"x": 5, "y": 5})
    assert "1%" in opened.evaluate(edge)


def test_both_sides_are_chosen(opened):
    left, right = opened.locator("#side-left"), opened.locator("#side-right")
    chosen = "[chosen.left, chosen.right].map((s) => [s.solver, s.nfe, s.lml])"
    assert opened.evaluate(chosen) == [["DDIM", 5, "off"], ["DDIM", 5, "default"]]
    left.get_by_label("Evaluations").select_option("10")
    right.get_by_label("Solver").select_option("DPM-Solver++(3M)")
    right.get_by_label("LML").select_option("off")
    assert opened.evaluate(chosen) == [["DDIM", 10, "off"], ["DPM-Solver++(3M)", 5, "off"]]
    assert "fd 9" in right.locator(".values").inner_text()
    assert "same noise" in opened.locator("#noise").inner_text()
    assert opened.evaluate("document.getElementById('left').naturalWidth") == 64


def test_the_papers_numbers_are_a_column(browser, make_run, tmp_path):
    runs = [
        make_run(solver=solver, nfe=nfe) for solver in ("authors_ddim", "ddim") for nfe in (5, 6)
    ]
    known = [result for run in runs for result in results.read_run(run, print)]
    theirs = [Published("fd", "cifar10", "authors_ddim", 6, 12.5, "Table 9")]
    for paper, heads in (([], 5), (theirs, 6)):
        shown = [(tables.build("fd", known, paper=paper), known)]
        (tmp_path / "page.html").write_text(page.render("study", known, shown, {}, [], []))
        with browser.new_context() as context:
            tab = context.new_page()
            tab.goto((tmp_path / "page.html").as_uri())
            assert tab.locator("#table th").count() == heads
            rows = tab.locator("#table tbody tr").all()
            texts = [row.locator("td").last.inner_text() for row in rows]
            assert not paper or texts == ["– / 12.5", ""]
            assert not paper or "Table 9" in tab.locator("#caption").inner_text()


def test_a_table_sorts(opened):
    column = (
        "[...document.querySelectorAll('#table tbody tr')].map((tr) => "
        "parseFloat(tr.cells[3].innerText))"
    )
    head = opened.locator("#table").get_by_role("button", name="5", exact=True)
    assert opened.evaluate(column) == [1, 5, 9, 13]
    head.click()
    opened.locator("#table").get_by_role("button", name="5 ▲").press("Enter")
    assert opened.evaluate(column) == [13, 9, 5, 1]
    assert opened.locator("#table th[aria-sort=descending]").count() == 1


@pytest.mark.parametrize("width", [400, 1600])
def test_it_is_no_wider_than_the_window(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    # wait_for_function would evaluate text in the page, which the page forbids
    opened.evaluate(
        """new Promise((done) => {
          const fits = () => chart.width === document.getElementById("chart").clientWidth;
          const look = () => (fits() ? done() : requestAnimationFrame(look));
          look();
        })"""
    )
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
