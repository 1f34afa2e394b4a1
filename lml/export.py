"""Exports images in the layouts of other people's tools."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

from lml.data.assets import locate
from lml.data.images import read
from lml.data.prompts import FILE, PromptSet, load
from lml.data.prompts import read as read_prompts
from lml.errors import UserError
from lml.files import NAME_MAX, file_hash, open_regular, plain_name, read_json, replacing
from lml.instances import make
from lml.report import compbench
from lml.report.labels import OFF, lml_label, lml_of_run
from lml.runs.records import check_output, read_config
from lml.schema import RunConfig, check, check_whole
from lml.seals import canonical, settings_hash

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


def export(cfg: DictConfig) -> str:
    """Make the export of `cfg` (configs/export.yaml); returns a line about the result."""
    config = OmegaConf.to_container(cfg, resolve=True)
    run_dir, out = config["run_dir"], Path(config["out"])
    check_output(out, "out")
    layout = make(config["layout"], "layout")
    if (run_dir is None) == (not config["prompts"]):
        raise UserError(f"run_dir={run_dir}: expected either a run or prompts=NAME, not both")
    if run_dir is None:
        prompts = load(config["prompts"])
    else:
        read_config(run_dir)
        if not (Path(run_dir) / FILE).is_file():
            raise UserError(
                f"run_dir={run_dir}: has no {FILE}; its images were made without prompts"
            )
        prompts = read_prompts(Path(run_dir) / FILE)
    try:
        return layout.export(prompts, run_dir and Path(run_dir), out)
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename})"
        raise UserError(f"out={out}: {reason}; the same command continues") from None


# --- T2I-CompBench -----------------------------------------------------------------------------


@dataclass
class T2ICompBench:
    """OUT/`model`/CATEGORY/`sampler`/samples/{prompt}_{index:06d}.png of a run.

    The evaluators of T2I-CompBench (arXiv 2307.06350; BLIP-VQA, UniDet, CLIPScore, 3-in-1) take a
    folder that holds `samples`. They read the prompt from the file name, up to the first "_", and
    sort by the rest. So the index counts the images of a category, with those of one prompt
    together, and `name_of` makes the name from the prompt. Images are linked, or copied if the file
    system has no links. run.json beside `samples` says whose they are: by it scripts/tabulate.py
    finds what the evaluators wrote (lml/report/compbench.py).
    """

    model: str | None = None
    sampler: str | None = None

    def export(self, prompts: PromptSet, run_dir: Path | None, out: Path) -> str:
        """Link the images of the run; existing ones stay."""
        if run_dir is None:
            raise UserError("run_dir=null: layout=t2i_compbench needs a run")
        manifest = read_json(run_dir / "manifest.json")
        if not manifest.get("complete"):
            raise UserError(f"run_dir={run_dir}: not complete; finish the run")
        if "category" not in prompts.entries[0]:
            raise UserError(f"run_dir={run_dir}: not made from prompts=t2i_compbench")
        config = read_config(run_dir)
        for key, given in (("model", self.model), ("solver", self.sampler)):
            part = config.get(key)
            name = part.get("name") if isinstance(part, dict) else part
            if given is None:
                plain_name(name, f"run_dir={run_dir}: config.yaml: {key}.name")
        check(config, RunConfig, f"run_dir={run_dir}: config.yaml")
        model = self.model or config["model"]["name"]
        sampler = self.sampler or _name_sampler(config)
        for key, name in (("model", model), ("sampler", sampler)):
            plain_name(name, f"layout.{key}")
        categories = compbench.by_category(run_dir, prompts, manifest.get("images"))
        samples = 1 + max(entry["sample"] for entry in prompts.entries)
        targets, changed = {}, set()
        for category, images in categories.items():
            folder = out / model / category / sampler / "samples"
            for image, (entry, sha256) in images.items():
                index = entry["prompt_index"] * samples + entry["sample"]
                name, kept = name_of(entry["prompt"], index)
                changed |= set() if kept else {entry["prompt"]}
                targets[folder / name] = image, sha256
        for folder in sorted({target.parent for target in targets}):
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir()):
                if file not in targets:
                    raise UserError(
                        f"{file}: not of this run, but it would be scored; move it away"
                    )
        images = run_dir / "images"
        todo = {
            target: images / image
            for target, (image, sha256) in tqdm(targets.items(), unit="image", disable=None)
            if not _is_placed(images / image, target, sha256)
        }
        # before the images, as it takes space on the disk, which links do not
        for category, laid in categories.items():
            folder = out / model / category / sampler
            compbench.mark(folder, category, laid, settings_hash(config["settings"]))
        for target, image in todo.items():
            _place(image, target)
        line = f"{len(targets)} images in {out / model / '*' / sampler / 'samples'}"
        if changed:
            line += f"; {len(changed)} prompts changed, since file names can't hold '/' and '_', "
            line += f"nor more than {NAME_MAX} bytes: {sorted(changed)[0]!r}"
        return line


def name_of(prompt: str, index: int) -> tuple[str, bool]:
    """An image's file name, and whether it holds the whole prompt for the benchmark's evaluators.

    "_" would end the prompt, and "/" cannot be in a name. Both become spaces, like control
    characters. A name longer than `NAME_MAX` bytes is cut after a word. The benchmark's own script
    fails for all of these, but none of its prompts has them.
    """
    end = f"_{index:06d}.png"
    text = re.sub(r"[/_\x00-\x1f\x7f]+", " ", prompt).strip()
    room = NAME_MAX - len(end)
    if len(text.encode()) > room:
        cut = text.encode()[: room + 1].decode(errors="ignore")
        whole = cut.rpartition(" ")[0].strip()
        text = whole or cut.encode()[:room].decode(errors="ignore")
    return text + end, text == prompt


def _name_sampler(config: dict) -> str:
    """Solver, evaluations, and LML's label in tables, or its hash if the label is too long."""
    solver = plain_name(config["solver"]["name"], "solver.name")
    lml = canonical(lml_of_run(config))
    label = lml_label(lml, solver, config["nfe"], config["model"]["name"])
    if label == OFF:
        return f"{solver}-{config['nfe']}"
    name = f"{solver}-{config['nfe']}-lml-"
    label = re.sub(r"[^\w.]+", "-", label).strip("-")
    fits = len(f"{name}{label}".encode()) <= NAME_MAX
    return name + (label if fits else settings_hash(config["lml"])[:10])


def _is_placed(image: Path, target: Path, sha256: str) -> bool:
    """Whether the image is at `target`.

    UserError if another file is there, or if the image is not the one that the run stored.
    """
    try:
        whole = file_hash(image) == sha256
    except OSError:  # missing, or no file
        whole = False
    if not whole:
        raise UserError(f"{image}: not the image of manifest.json; finish the run again")
    if not target.exists():
        return False
    if not target.samefile(image) and file_hash(target) != sha256:
        raise UserError(f"{target}: of another run; choose another out or layout.sampler")
    return True


def _place(image: Path, target: Path) -> None:
    """Link or copy a file, completely or not at all."""
    try:
        os.link(image, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # outside the folder, since every file in it is scored
        apart = target.parent.parent
        with replacing(target, apart=apart) as copy, open_regular(image) as original:
            shutil.copyfileobj(original, copy)


# --- MS-COCO -----------------------------------------------------------------------------------

RULES = {
    "edm": "centre crop to the shorter side, Pillow's Lanczos to {size}",
    "torchvision": "torchvision's Resize({size}) and CenterCrop({size})",
}


@dataclass
class CocoReference:
    """The images of val2014 (in the folder `images`) whose captions are the prompts `coco14_30k`.

    By the `rule` "edm", each image is cropped to the square in its middle, from
    ((W - s) // 2, (H - s) // 2) with s the shorter side, and resized to `size` with Pillow's
    Lanczos filter, as in EDM's dataset_tool (arXiv 2206.00364). By the rule "torchvision", it goes
    through torchvision's Resize(size) (bilinear) and CenterCrop(size). Both are antialiased, and
    enlarge smaller images. Grey becomes RGB. The format is PNG. reference.json beside them records
    this.
    """

    images: str
    size: int = 256
    rule: str = "edm"

    def export(self, prompts: PromptSet, run_dir: Path | None, out: Path) -> str:
        """Write the images that are missing."""
        check_whole(self.size, "layout.size")
        if self.rule not in RULES:
            raise UserError(f"layout.rule={self.rule}: expected {' or '.join(RULES)}")
        if "file_name" not in prompts.entries[0]:
            raise UserError(
                f"prompts={prompts.source}: layout=coco_reference needs prompts=coco14_30k"
            )
        names = [
            plain_name(entry.get("file_name"), f"prompts={prompts.source}: file_name")
            for entry in prompts.entries
        ]
        folder = locate(self.images)
        if not folder.is_dir():
            raise UserError(f"layout.images={self.images}: no such folder")
        missing = sorted(set(names) - {file.name for file in folder.iterdir()})
        if missing:
            raise UserError(
                f"layout.images={self.images}: has no {missing[0]}"
                + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
            )
        targets = {out / f"{Path(name).stem}.png": folder / name for name in names}
        self._describe(prompts, out, set(targets))
        with ThreadPoolExecutor() as pool:
            made = pool.map(self._make, targets.values(), targets)
            for _ in tqdm(made, total=len(targets), unit="image", disable=None):
                pass
        return f"{len(targets)} images of {self.size}x{self.size} pixels in {out}"

    def _describe(self, prompts: PromptSet, out: Path, targets: set[Path]) -> None:
        rule = {
            "resize": RULES[self.rule].format(size=self.size),
            "images": "MS-COCO val2014",
            "count": len(targets),
            "sha256": prompts.settings["sha256"],
        }
        about = out / "reference.json"
        others = set(out.iterdir()) - targets - {about} if out.exists() else set()
        others = {file for file in others if not file.name.startswith(".")}
        if others:
            raise UserError(f"{min(others)}: not of this reference set; move it away")
        if about.exists() and read_json(about) != rule:
            raise UserError(f"out={out}: holds another reference set; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with replacing(about) as file:
            file.write((json.dumps(rule, indent=2) + "\n").encode())

    def _make(self, image: Path, target: Path) -> None:
        if target.exists():
            return
        picture = Image.fromarray(read(image).permute(1, 2, 0).numpy())
        with replacing(target, durable=False) as file:
            self._fit(picture).save(file, "PNG")

    def _fit(self, picture: Image.Image) -> Image.Image:
        if self.rule == "torchvision":
            return center_crop(resize(picture, self.size), self.size)
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
        return picture.resize((self.size, self.size), Image.Resampling.LANCZOS)
