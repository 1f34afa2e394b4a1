"""The paper's tables, `experiment=paper_...`: at toy size from the command to the table."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch.nn.functional as F
import yaml
from PIL import Image

from lml.data.assets import ROOT

TABLES = sorted(file.stem for file in (ROOT / "configs/experiment").glob("paper_*.yaml"))
TOY = ["num_images=2", "batch_size=2", "nfe=5", "threads=1", "dtype=float32", "progress=false"]
STATUSES = ("done", "refused")
SIZE = ["model.height=16", "model.width=16"]


@pytest.fixture
def arguments(tiny_model, pipelines, pictures, tiny_configs, tmp_path):
    """`arguments(table)`: what puts tiny networks in place of those on hubs, and few prompts."""
    (tmp_path / "T2I-CompBench").mkdir()
    for category in ("color", "shape", "texture", "spatial", "non_spatial", "complex"):
        (tmp_path / f"T2I-CompBench/{category}_val.txt").write_text("a red cat\na dog\n")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def scores(*names: str) -> list[str]:
        keys = [
            f"++metrics.{name}.{key}={list(value) if isinstance(value, tuple) else value}"
            for name in names
            for key, value in tiny_configs[name].items()
            if value is not None
        ]
        return [f"metrics=[{','.join(names)}]", *keys]

    def reference(side: int) -> list[str]:
        (tmp_path / "reference").mkdir()
        for i, image in enumerate(F.interpolate(pictures.images.float(), side).byte()):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"reference/{i}.png")
        return [f"metrics.fd_dinov2.reference={tmp_path}/reference"]  # FID takes 10 s a cell

    def find(table: str) -> list[str]:
        if table in ("paper_cifar10", "paper_celebahq"):
            path, side = (tiny_model, 8) if "cifar10" in table else (pipelines / "celebahq_ldm", 16)
            return [f"model.path={path}", *scores("fd_dinov2"), *reference(side)]
        given = [f"model.path={pipelines}/${{model.name}}", *SIZE]  # one path for several models
        if "coco" in table:
            prompts = ["prompts=text", f"prompts.file={tmp_path}/prompts.txt"]
            return [*given, *prompts, *scores("clip_score", "image_reward")]
        prompts = [f"prompts.path={tmp_path}/T2I-CompBench", "prompts.samples_per_prompt=1"]
        return [*given, *prompts, *scores("clip_cosine")]

    return find


def evaluate_color(script, study, run):
    """Writes what T2I-CompBench's evaluator of colors does for a run of two images."""
    if run is None:
        return
    out = study / "evaluations"
    known = set(out.rglob("samples"))
    arguments = ["layout=t2i_compbench", f"run_dir={study / run}", f"out={out}"]
    assert script("export", *arguments).code == 0
    (samples,) = set(out.rglob("samples")) - known
    scores = [{"question_id": i, "answer": "0.2500"} for i in range(2)]
    (samples.parent / "annotation_blip").mkdir()
    (samples.parent / "annotation_blip/vqa_result.json").write_text(json.dumps(scores))


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_paper_is_one_command(script, arguments, table, tmp_path):
    given = [f"experiment={table}", *arguments(table)]
    fewer = []
    if table == "paper_t2i_compbench":  # with all solvers it has 40 cells
        fewer = ["solver=authors_ddim,authors_compbench_dpm_lm,deis,deis_calibrated"]
    made = script("sample", "-m", *given, *TOY, *fewer, "rate=100")
    assert made.code == 0, made.err
    estimate = r"\d+ cells, \d+ refused; to make: \d+ images, \d+ evaluations, about \d+ s at 100 "
    assert re.match(f"{table}: {estimate}evaluations/s\n", made.out)
    cells = yaml.safe_load((tmp_path / f"outputs/{table}/sweep.yaml").read_text())["cells"]
    solvers = {status: {c["solver"] for c in cells if c["status"] == status} for status in STATUSES}
    assert sum(map(len, solvers.values())) and {cell["status"] for cell in cells} <= set(STATUSES)
    assert any(solver.endswith(("_lm", "lml_euler")) for solver in solvers["done"])
    # what lacks is the calibrations, in one line, and PNDM's first steps, of Runge-Kutta's kind
    assert solvers["refused"] <= {"dpmsolverpp", "deis", "ddim", "flow_euler", "authors_pndm"}
    (line,) = (line for line in made.err.splitlines() if line.startswith("lml=calibrated: "))
    assert "python scripts/calibrate.py" in line

    paper = tmp_path / "experiments" / table / "paper.csv"
    paper.parent.mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / table / "paper.csv", paper)
    if table in ("paper_t2i_compbench", "paper_flux"):
        for cell in cells:
            evaluate_color(script, tmp_path / f"outputs/{table}", cell["run"])
    outcome = script("tabulate", *given)
    assert outcome.code == 0, outcome.err
    if "paper_t2i" in table or "flux" in table:
        assert (paper.parent / "t2i_compbench_color.md").read_text().count("0.2500") >= 2
    for file in paper.parent.glob("*.md"):
        assert "Protocol: " in file.read_text()
        assert all(f"| {solver} |" in file.read_text() for solver in solvers["done"])
