"""The scores that T2I-CompBench's own evaluators gave to runs (arXiv 2307.06350).

`layout=t2i_compbench` (lml/export.py) exports a run's images for them. Beside the images of each
category it writes a file that identifies the run. Each evaluator adds a JSON of its scores.
The folder may come from somebody else, so its files are checked.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lml.data.prompts import FILE, PromptSet, read
from lml.errors import UserError, first_line
from lml.files import load_json, plain_name, read_object, write_json
from lml.schema import CompBenchExport, CompBenchScore, check, check_whole
from lml.seals import settings_hash

METRIC = "t2i_compbench"  # in tables; its parts are the categories
EXPORT = "run.json"  # beside the folder of samples
IMAGES = 3000  # in a category: 300 prompts, 10 images each
LARGEST = 1 + 1e-6  # a cosine or a share, up to rounding


# By the name of an image: the record of its prompt, and its sha256.
Images = dict[str, tuple[dict[str, Any], str]]


@dataclass(frozen=True)
class Evaluator:
    """One of T2I-CompBench's evaluators: its name in the paper, and the file that it writes."""

    name: str
    file: str


BLIP_VQA = Evaluator("BLIP-VQA", "annotation_blip/vqa_result.json")
# In the order of the paper.
EVALUATORS = {
    "color": BLIP_VQA,
    "shape": BLIP_VQA,
    "texture": BLIP_VQA,
    "spatial": Evaluator("UniDet", "labels/annotation_obj_detection_2d/vqa_result.json"),
    "3d_spatial": Evaluator("UniDet", "labels/annotation_obj_detection_3d/vqa_result.json"),
    "numeracy": Evaluator("UniDet", "annotation_num/vqa_result.json"),
    "non_spatial": Evaluator("CLIPScore", "annotation_clip/vqa_result.json"),
    "complex": Evaluator("3-in-1", "annotation_3_in_1/vqa_result.json"),
}


def is_score(metric: str) -> bool:
    """Whether the metric is one of T2I-CompBench's categories."""
    return metric.startswith(f"{METRIC}/")


def by_category(run: Path, prompts: PromptSet, hashes: Any) -> dict[str, Images]:
    """The images of each category of the run in the folder `run`, in their order.

    `hashes` is `images` of the run's manifest. UserError unless it has one image for each prompt,
    or if a name leads out of its folder.
    """
    label = f"run_dir={run}"
    if not isinstance(hashes, dict) or len(hashes) != len(prompts):
        count = len(hashes) if isinstance(hashes, dict) else "no"
        raise UserError(f"{label}: {len(prompts)} prompts, {count} images")
    for name in hashes:
        plain_name(name, f"{label}: manifest.json: image")
    images = defaultdict(dict)
    for entry, name in zip(prompts.entries, sorted(hashes), strict=True):
        category = plain_name(entry.get("category"), f"{label}: {FILE}: category")
        for key in ("sample", "prompt_index"):
            check_whole(entry.get(key), f"{label}: {FILE}: {key}", least=0)
        images[category][name] = entry, hashes[name]
    return dict(images)


def _hash(images: Images) -> str:
    return settings_hash({name: sha256 for name, (_, sha256) in images.items()})


def mark(folder: Path, category: str, images: Images, settings_sha256: str) -> None:
    """Write a file into `folder`, the folder of a category, that identifies run and images."""
    values = {"category": category, "settings_sha256": settings_sha256}
    write_json(folder / EXPORT, {**values, "images_sha256": _hash(images)}, "out")


class Evaluations:
    """The scores in a folder that `layout=t2i_compbench` made.

    UserError if the folder does not exist or cannot be used.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{self._label()}: no such folder")
        # the folders of each run's categories, by the run's hash and the category
        self._exports: dict[str, dict[str, tuple[Path, str]]] = defaultdict(dict)
        for file in sorted(folder.glob(f"*/*/*/{EXPORT}")):
            export = self._read_export(file)
            categories = self._exports[export["settings_sha256"]]
            if export["category"] in categories:
                other = categories[export["category"]][0].relative_to(folder)
                raise UserError(
                    f"{self._label(file.parent)}: has the same run and category as {other}; "
                    "move one of them away"
                )
            categories[export["category"]] = file.parent, export["images_sha256"]

    def scores(
        self, run: Path, manifest: Mapping[str, Any], say: Callable[[str], None]
    ) -> dict[str, list[float]]:
        """For each evaluated category: the scores of its images, in their order.

        {} for a run that was not exported to the folder. `say` is called with a line about the
        categories that were not evaluated. UserError unless the scores belong to exactly the run's
        images.
        """
        exports = self._exports.get(manifest["settings_sha256"])
        if not exports:
            return {}
        images = by_category(run, read(run / FILE), manifest["images"])
        for category in [*exports, *images]:
            if category not in exports:
                raise UserError(
                    f"{self._label()}: {category} of {run} is missing; export the run again"
                )
            if category not in images:
                raise UserError(
                    f"{self._label(exports[category][0])}: {run} has no category {category}; "
                    "move this folder away"
                )
        scores = {}
        for category, evaluator in EVALUATORS.items():
            if category not in images:
                continue
            folder, images_sha256 = exports[category]
            if images_sha256 != _hash(images[category]):
                raise UserError(
                    f"{self._label(folder)}: its images are not those of {run}; export the run to "
                    "another folder, and evaluate it there"
                )
            file = folder / evaluator.file
            if os.path.lexists(file):
                scores[category] = self._read_scores(file, len(images[category]), run)
        if missing := [category for category in images if category not in scores]:
            say(f"{run}: T2I-CompBench's evaluators have not scored {', '.join(missing)}")
        return scores

    def _label(self, path: Path | None = None) -> str:
        inside = f": {path.relative_to(self.folder)}" if path else ""
        return f"evaluations={self.folder}{inside}"

    def _read_export(self, file: Path) -> dict[str, Any]:
        try:
            return read_object(file, CompBenchExport)
        except (FileNotFoundError, UserError) as error:
            reason = str(error).removeprefix(f"{file}: ")
            raise UserError(f"{self._label(file)}: {reason}; export the run again") from None

    def _read_scores(self, file: Path, count: int, run: Path) -> list[float]:
        label = self._label(file)
        try:
            found = load_json(file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(
                f"{label}: cannot be read ({first_line(reason)}); evaluate again"
            ) from None
        if not isinstance(found, list):
            raise UserError(f"{label}: expected a list of question_id and answer; evaluate again")
        check(found, list[CompBenchScore], label)
        if len(found) != count:
            raise UserError(
                f"{label}: scores of {len(found)} images, but {run} has {count} of this category; "
                "evaluate again"
            )
        scores = dict(self._numbers(found, label))
        if sorted(scores) != list(range(count)):
            wrong = sorted(scores.keys() - range(count))
            what = f"has question_id {wrong[0]}" if wrong else "has a question_id twice"
            raise UserError(f"{label}: {what}; expected 0 to {count - 1}, each once")
        return [scores[number] for number in range(count)]

    def _numbers(self, found: list[dict[str, Any]], label: str) -> Iterator[tuple[int, float]]:
        for entry in found:
            number, answer = entry["question_id"], entry["answer"]
            try:
                score = float(answer)  # BLIP-VQA writes text
            except (ValueError, OverflowError):
                score = math.nan
            if not abs(score) <= LARGEST:
                raise UserError(
                    f"{label}: answer {answer!a:.40} of question_id {number}: expected a number "
                    "in [-1, 1]"
                )
            yield number, score


def as_metrics(scores: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The mean over images for each evaluated category, in the format of metrics.json."""
    by = defaultdict(list)
    for category, evaluator in EVALUATORS.items():
        by[evaluator.name].append(category)
    how = ", ".join(f"{name} of {', '.join(several)}" for name, several in by.items())
    made = {}
    for category, numbers in scores.items():
        entry = {"value": statistics.fmean(numbers), "protocol": {"evaluators": how}}
        if len(numbers) < IMAGES:
            entry["warning"] = (
                f"{len(numbers)} images of {category}; T2I-CompBench asks for {IMAGES}"
            )
        made[f"{METRIC}/{category}"] = entry
    return made
