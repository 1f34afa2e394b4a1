"""What T2I-CompBench's evaluators wrote, in the tables of a study."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lml.data.assets import ROOT
from lml.files import read_json
from lml.report import labels
from lml.report.compbench import EVALUATORS, METRIC
from lml.report.tables import Table

CATEGORIES = ("color", "spatial", "non_spatial", "complex")
FILES = {
    "color": "annotation_blip",
    "spatial": "labels/annotation_obj_detection_2d",
    "non_spatial": "annotation_clip",
    "complex": "annotation_3_in_1",
}
SAMPLERS = ("ddim-2", "ddim-2-lml-default", "ddim-3", "ddim-3-lml-default")
COLOR = "sd15/color/ddim-2"


@pytest.fixture(scope="module")
def made(tmp_path_factory, pipelines):
    """A study of four runs of a tiny Stable Diffusion, two prompts and four images a category."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "dataset").mkdir()
    for category in CATEGORIES:
        (folder / f"dataset/{category}_val.txt").write_text("a cat\na dog\n")
    arguments = [
        "model=sd15",
        f"model.path={pipelines / 'sd15'}",
        "model.height=16",
        "model.width=16",
        "prompts=t2i_compbench",
        "prompts.path=dataset",
        f"prompts.categories=[{','.join(CATEGORIES)}]",
        "prompts.samples_per_prompt=2",
        "num_images=16",
        "solver=ddim",
        "name=study",
        "metrics=none",
        "threads=1",
        "nfe=2,3",
        "lml=off,default",
    ]
    call(folder, "sample", "-m", *arguments)
    runs = ",".join(str(run.parent) for run in folder.glob("outputs/study/*/manifest.json"))
    export = ("layout=t2i_compbench", "out=outputs/study/evaluations")
    call(folder, "export", "-m", *export, f"run_dir={runs}")
    return folder


def call(folder: Path, name: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / f"scripts/{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def study(made, tmp_path) -> Path:
    """The study's folder of evaluations, all of them made."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "outputs/study/evaluations"
    for samples in folder.glob("*/*/*/samples"):
        evaluate(samples.parent)
    return folder


def score(folder: Path, number: int) -> float:
    """A score for image `number` of a category."""
    category, sampler = folder.parts[-2:]
    base = CATEGORIES.index(category) / 10 + SAMPLERS.index(sampler) / 100
    return round(base + number / 1000, 4)


def evaluate(folder: Path) -> None:
    """Write what the benchmark's evaluator of this category writes into the folder.

    BLIP-VQA writes text. UniDet's question_id is the number in the image's name, and the others'
    counts the images in the order of these numbers.
    """
    category = folder.parts[-2]
    names = sorted(os.listdir(folder / "samples"), key=lambda name: int(name[-10:-4]))
    answers = []
    for count, name in enumerate(names):
        number = int(name[-10:-4]) if category == "spatial" else count
        answer = score(folder, count)
        answer = f"{answer:.4f}" if category == "color" else answer
        answers.append({"question_id": number, "answer": answer})
    place = folder / FILES[category]
    place.mkdir(parents=True)
    (place / "vqa_result.json").write_text(json.dumps(answers))


def mean(category: str, sampler: str) -> float:
    return sum(score(Path(category, sampler), k) for k in range(4)) / 4


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_scores_stand_in_the_tables_by_category(script, study, tmp_path):
    outcome = script("tabulate", "name=study")
    assert (outcome.code, outcome.err) == (0, "")
    out = tmp_path / "experiments/study"
    for nfe in (2, 3):
        found = rows(out / f"t2i_compbench_nfe{nfe}.csv")
        assert [row["category"] for row in found] == [*CATEGORIES, *CATEGORIES]
        for row in found:
            sampler = f"ddim-{nfe}" + ("-lml-default" if row["lml"] == "default" else "")
            assert float(row["mean"]) == pytest.approx(mean(row["category"], sampler), abs=1e-12)
        text = (out / f"t2i_compbench_nfe{nfe}.md").read_text()
        assert "| solver | grid | LML | color | spatial | non_spatial | complex | paper |" in text
        assert f"t2i_compbench (higher is better) by category at {nfe} network evaluations" in text
        assert "evaluators BLIP-VQA of color, shape, texture, UniDet of spatial" in text
        assert (
            "Warning: 4 images of color; T2I-CompBench asks for 3000."
            in (out / "t2i_compbench_color.md").read_text()
        )
        assert (out / f"t2i_compbench_nfe{nfe}.tex").is_file()
    results = {row["metric"] for row in rows(out / "results.csv")}
    assert results == {f"t2i_compbench/{category}" for category in CATEGORIES}
    for category in CATEGORIES:
        found = rows(out / f"t2i_compbench_{category}.csv")
        assert [(row["nfe"], row["lml"]) for row in found] == [
            ("2", "off"),
            ("3", "off"),
            ("2", "default"),
            ("3", "default"),
        ]
        assert labels.metric_name(f"{METRIC}/{category}") in (out / "index.html").read_text()


def test_they_stand_beside_the_runs_own_metrics(script, study, tmp_path):
    (run, *_) = sorted(path.parent for path in study.parent.glob("*/manifest.json"))
    assert script("evaluate", f"run_dir={run}", "metrics=[convergence]", "threads=1").code == 0
    assert script("tabulate", "name=study").code == 0
    found = {(r["run"], r["metric"]) for r in rows(tmp_path / "experiments/study/results.csv")}
    assert {(run.name, "convergence/rmse"), (run.name, "t2i_compbench/color")} <= found


def test_another_folder_is_named_by_its_key(script, study, tmp_path):
    study.rename(tmp_path / "elsewhere")
    outcome = script("tabulate", "name=study")
    assert outcome.code == 0 and "t2i_compbench (" not in outcome.out
    outcome = script("tabulate", "name=study", "evaluations=elsewhere")
    assert (outcome.code, outcome.err) == (0, "") and "t2i_compbench (" in outcome.out


def test_runs_side_by_side_have_them_too(script, study, tmp_path):
    runs = [str(file.parent) for file in study.parent.glob("*/manifest.json")]
    page = tmp_path / "outputs/compare.html"
    names = [labels.metric_name(f"{METRIC}/{category}") for category in CATEGORIES]
    assert script("compare", *runs).code == 0
    assert all(name in page.read_text() for name in names)
    first = page.read_bytes()
    study.rename(tmp_path / "elsewhere")
    assert script("compare", *runs).code == 0
    assert not any(name in page.read_text() for name in names)
    assert script("compare", *runs, "evaluations=elsewhere").code == 0
    assert page.read_bytes() == first
    (tmp_path / "empty").mkdir()
    outcome = script("compare", *runs, "evaluations=empty")
    assert outcome.code == 2 and outcome.err.count("\n") == 1


def test_what_is_not_evaluated_yet_is_said(script, study, tmp_path):
    (study / COLOR / "annotation_blip/vqa_result.json").unlink()
    shutil.rmtree(study / "sd15/spatial/ddim-2/labels")
    outcome = script("tabulate", "name=study")
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    line = "T2I-CompBench's evaluators have not scored color, spatial"
    assert outcome.err.startswith("outputs/study/") and line in outcome.err
    out = tmp_path / "experiments/study"
    by = {(r["lml"], r["category"]): r for r in rows(out / "t2i_compbench_nfe2.csv")}
    assert by["off", "color"]["status"] == by["off", "spatial"]["status"] == "missing"
    assert by["off", "complex"]["mean"] and by["default", "color"]["mean"]
    assert line in (out / "t2i_compbench_nfe2.md").read_text()


def test_every_category_has_a_name_that_people_write():
    for category, evaluator in EVALUATORS.items():
        name = labels.METRICS[f"{METRIC}/{category}"]
        assert name.startswith("T2I-CompBench ") and name.endswith(f" ({evaluator.name})")
        assert Table(f"{METRIC}/{category}", {}).higher


def test_the_docs_name_every_evaluators_file():
    text = (ROOT / "docs/running.md").read_text()
    found = {}
    for line in re.findall(r"^\| (`.*vqa_result.json`) \|$", text, re.M):
        categories, name, file = line.split(" | ")
        for category in re.findall(r"`(\w+)`", categories):
            found[category] = (name.split(",")[0], file.strip("`"))
    assert found == {key: (each.name, each.file) for key, each in EVALUATORS.items()}


# --- what is refused ----------------------------------------------------------------------------


def refused(script, tmp_path, *patterns: str, evaluations: str | None = None) -> None:
    arguments = [f"evaluations={evaluations}"] if evaluations else []
    outcome = script("tabulate", "name=study", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert outcome.err.startswith("evaluations=")
    assert all(pattern in outcome.err for pattern in patterns), outcome.err
    assert len(outcome.err) < 400 and not (tmp_path / "experiments").exists()


def answers(count: int = 4, **changed: object) -> list[dict[str, object]]:
    """Scores of `count` images; the last has the `changed` keys."""
    made = [{"question_id": k, "answer": "0.5"} for k in range(count)]
    return [*made[:-1], {**made[-1], **changed}]


HERE = f"{COLOR}/annotation_blip/vqa_result.json"
DAMAGED = {
    "": "cannot be read",
    '[{"question_id": 0, "ans': "cannot be read",
    1000 * "[": "cannot be read",
    "{}": "expected a list of question_id and answer",
    "7": "expected a list of question_id and answer",
    "[7]": "[0]=7: expected a group of keys",
    '[{"answer": "0.5"}]': "[0].question_id: missing; expected a whole number",
    json.dumps(answers(answer=None)): "[3].answer=null: expected a number or text",
    json.dumps(answers(answer=True)): "[3].answer=True: expected a number or text",
    json.dumps(answers(answer="yes")): "answer 'yes' of question_id 3: expected a number in",
    json.dumps(answers(answer="nan")): "answer 'nan' of question_id 3: expected a number in",
    json.dumps(answers(answer=float("inf"))): "answer inf of question_id 3: expected a number in",
    json.dumps(answers(answer=10**400)): "of question_id 3: expected a number in",
    json.dumps([{**each, "answer": 1e308} for each in answers()]): "expected a number in [-1, 1]",
    json.dumps(answers(answer=-1.01)): "answer -1.01 of question_id 3: expected a number in [-1,",
    json.dumps(answers(question_id=-1)): "[3].question_id=-1: expected a whole number",
    json.dumps(answers(question_id="3")): "[3].question_id=3: expected a whole number",
    json.dumps(answers(question_id=12)): "has question_id 12; expected 0 to 3",
    json.dumps(answers(question_id=2)): "has a question_id twice; expected 0 to 3",
    json.dumps(answers(3)): "scores of 3 images, but outputs/study/",
    json.dumps(answers(5)): "scores of 5 images, but outputs/study/",
    "[]": "scores of 0 images, but outputs/study/",
}


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_scores_that_are_not_those_of_the_run(script, study, tmp_path, content):
    (study / HERE).write_text(content)
    refused(script, tmp_path, f"=outputs/study/evaluations: {HERE}", DAMAGED[content])


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "device", "binary"])
def test_scores_that_are_no_file(script, study, tmp_path, kind):
    file = study / HERE
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "binary":
        file.write_bytes(b"\x80\x04\xff")
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    refused(script, tmp_path, f"{HERE}: cannot be read (")


def edit(file: Path, **entries: object) -> None:
    file.write_text(json.dumps({**read_json(file), **entries}))


def test_an_export_that_is_not_of_the_run(script, study, tmp_path):
    """Its record is damaged, it lacks a category or has one too many, or the run was made anew."""
    mark = study / COLOR / "run.json"
    whole = mark.read_text()
    for content, pattern in (
        ("{", "cannot be read"),
        ("[]", "not an object of keys and values"),
        ("{}", "category: missing; expected text on one line"),
        (json.dumps({**json.loads(whole), "settings_sha256": "../x"}), "settings_sha256=../x"),
    ):
        mark.write_text(content)
        refused(script, tmp_path, f"{COLOR}/run.json: {pattern}", "; export the run again")
    mark.unlink()
    refused(script, tmp_path, "evaluations: color of outputs/study/", "is missing; export the run")
    mark.write_text(whole)
    edit(mark, category="shape")
    refused(script, tmp_path, f"{COLOR}: outputs/study/", "has no category shape; move this folder")
    edit(mark, category="spatial")
    refused(script, tmp_path, "has the same run and category as sd15/color/ddim-2; move one")
    edit(mark, category="color", images_sha256="0" * 64)
    refused(script, tmp_path, f"{COLOR}: its images are not those of outputs/study/")
    mark.write_text(whole)
    assert script("tabulate", "name=study").code == 0


def test_a_folder_without_scores_of_the_runs(script, study, tmp_path):
    refused(script, tmp_path, "=nowhere: no such folder", evaluations="nowhere")
    refused(script, tmp_path, "=2024: expected a path", evaluations="2024")
    (tmp_path / "empty").mkdir()
    refused(script, tmp_path, "no scores of the runs in outputs/study", evaluations="empty")
    for mark in study.glob("*/*/*/run.json"):
        edit(mark, settings_sha256="0" * 64) if "ddim-2" in mark.parts else mark.unlink()
    refused(script, tmp_path, "no scores of the runs in outputs/study; export them there with")


def test_a_run_that_was_made_anew_has_no_scores_of_the_old_one(script, study, tmp_path):
    """The same settings, and one other image."""
    run = next(
        path.parent
        for path in study.parent.glob("*/manifest.json")
        if read_json(path)["settings_sha256"]
        == read_json(study / COLOR / "run.json")["settings_sha256"]
    )
    manifest = read_json(run / "manifest.json")
    manifest["images"]["000002.png"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    refused(script, tmp_path, f"{COLOR}: its images are not those of outputs/study/{run.name}")
