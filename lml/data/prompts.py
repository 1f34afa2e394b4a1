"""Prompt sets for text-to-image models: one prompt for each image, in a fixed order."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lml.data.assets import locate
from lml.errors import UserError, nearest
from lml.files import load_json, read_bytes
from lml.instances import make
from lml.schema import check_whole

FILE = "prompts.jsonl"  # in a run's folder
TABLES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True, repr=False)
class PromptSet(Sequence):
    """`prompts[k]` is the prompt of image k; a slice is a PromptSet, too.

    `entries` are JSON objects: {"prompt": str} and other keys that identify it in `source`.
    """

    source: str
    entries: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | slice) -> str | PromptSet:
        if isinstance(key, slice):
            return PromptSet(self.source, self.entries[key])
        return self.entries[key]["prompt"]

    def __iter__(self) -> Iterator[str]:
        return (entry["prompt"] for entry in self.entries)

    @property
    def texts(self) -> list[str]:
        """The prompts."""
        return list(self)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The record of each image: its index, its prompt, and where the prompt comes from."""
        return [{"index": index, **entry} for index, entry in enumerate(self.entries)]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the prompts; `sha256` is that of `to_jsonl()` in UTF-8."""
        sha256 = hashlib.sha256(self.to_jsonl().encode()).hexdigest()
        return {"source": self.source, "count": len(self), "sha256": sha256}

    def take(self, count: int) -> PromptSet:
        """The first `count` prompts. UserError if there are fewer."""
        if count > len(self):
            raise UserError(f"num_images={count}: prompts={self.source} has {len(self)}")
        return self[:count]

    def to_jsonl(self) -> str:
        """`records`, one JSON object on each line."""
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)


def load(config: Mapping[str, Any] | None) -> PromptSet | None:
    """The prompts that the config group `prompts` describes; None if it is empty."""
    if not config:
        return None
    prompts = make(config, "prompts")
    if not isinstance(prompts, PromptSet):
        raise UserError(f"prompts: expected a _target_ that makes a PromptSet, not {prompts!r}")
    return prompts


def read(path: str | Path) -> PromptSet:
    """Read a file that `PromptSet.to_jsonl` made. UserError for any other file."""
    entries = []
    for number, record in _read_jsonl(Path(path), str(path)):
        index, prompt = record.pop("index", None), record.get("prompt")
        if index != len(entries) or not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{path}: line {number} is not the record of prompt {len(entries)}")
        entries.append(record)
    return _collect(FILE, entries, str(path))


def find_texts(images: str | Path, config: Mapping[str, Any] | None = None) -> list[str] | None:
    """The prompts of a folder of images: those of the run that made it, otherwise of `config`.

    None if there are neither. UserError if there are both and they differ.
    """
    own, given = Path(images).resolve().parent / FILE, load(config)
    if not own.is_file():
        return given and given.texts
    texts = read(own).texts
    if given is not None and given.texts != texts:
        raise UserError(
            f"prompts: images={images} were made from the prompts in {own}; give no others"
        )
    return texts


# --- sets --------------------------------------------------------------------------------------


def text(file: str | Path) -> PromptSet:
    """One prompt on each line, UTF-8. Whitespace around prompts and empty lines don't count."""
    label = f"prompts.file={file}"
    lines = _lines(_read(locate(file), label))
    return _collect("text", ({"prompt": line, "line": n} for n, line in enumerate(lines, 1)), label)


def table(file: str | Path, column: str = "prompt") -> PromptSet:
    """One column of a CSV, TSV (both with a header) or JSONL file, UTF-8; empty cells don't count.

    Quoted cells may hold separators, quotes and line breaks. A TSV file whose quotes are wrong is
    read as one without quoting.
    """
    label = f"prompts.file={file}"
    path = locate(file)
    if path.suffix.lower() not in TABLES:
        raise UserError(f"{label}: expected one of {', '.join(TABLES)}")
    rows = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv
    entries = []
    for number, row in rows(path, label):
        if column not in row:
            known = nearest(column, map(str, row))
            raise UserError(
                f"prompts.column={column}: not in line {number} of {file}; it has {known}"
            )
        if not isinstance(row[column], str):
            raise UserError(f"prompts.column={column}: no text in line {number} of {file}")
        entries.append({"prompt": row[column], "line": number})
    return _collect("table", entries, label)


def captions(file: str | Path) -> PromptSet:
    """The captions of a JSON file {key: caption}, UTF-8, in the order of the file.

    The authors' script for COCO (scripts/StableDiffusion_COCO.py) reads such a file. Each key is in
    the records.
    """
    label = f"prompts.file={file}"
    content = _read(locate(file), label)
    try:
        found = load_json(content, unique=True)
    except ValueError as error:
        raise UserError(f"{label}: expected JSON, {{key: caption}} ({error})") from None
    if isinstance(found, dict) and "annotations" in found:
        raise UserError(f"{label}: has annotations, as MS-COCO's files; use prompts=coco14_30k")
    if not isinstance(found, dict):
        raise UserError(f"{label}: expected an object of JSON, {{key: caption}}")
    for key, caption in found.items():
        if not isinstance(caption, str) or not caption.strip():
            what = "is empty" if isinstance(caption, str) else "is no text"
            raise UserError(
                f"{label}: the caption of {key!a:.100} {what}; expected {{key: caption}}"
            )
    entries = ({"prompt": caption, "key": key} for key, caption in found.items())
    return _collect("captions", entries, label)


def t2i_compbench(
    path: str | Path, categories: Sequence[str], samples_per_prompt: int = 10
) -> PromptSet:
    """T2I-CompBench's validation prompts (arXiv 2307.06350), each `samples_per_prompt` times.

    `path` is the benchmark's repository, or a folder of CATEGORY_val.txt. The order is by category,
    prompt and sample, as the benchmark's own evaluators need it (lml/export.py).
    """
    check_whole(samples_per_prompt, "prompts.samples_per_prompt")
    folder = locate(path)
    if (folder / "examples/dataset").is_dir():
        folder = folder / "examples/dataset"
    known = [file.name.removesuffix("_val.txt") for file in folder.glob("*_val.txt")]
    if not known:
        raise UserError(f"prompts.path={path}: no folder with T2I-CompBench's *_val.txt")
    entries = []
    categories = [categories] if isinstance(categories, str) else list(categories)
    for number, category in enumerate(categories):
        if category not in known:
            raise UserError(
                f"prompts.categories=[{category}]: no {category}_val.txt in {folder}; "
                f"it has {', '.join(sorted(known))}"
            )
        if category in categories[:number]:
            raise UserError(f"prompts.categories: {category} twice; expected each once")
        file = folder / f"{category}_val.txt"
        # after a tab comes a note of its authors
        lines = [line.split("\t")[0].strip() for line in _lines(_read(file, str(file)))]
        entries += [
            {"prompt": line, "category": category, "prompt_index": index, "sample": sample}
            for index, line in enumerate(filter(None, lines))
            for sample in range(samples_per_prompt)
        ]
    return _collect("t2i_compbench", entries, f"prompts.path={path}")


def coco14_30k(file: str | Path, count: int = 30_000, seed: int = 0) -> PromptSet:
    """Captions of `count` images of MS-COCO's val2014, one each, from captions_val2014.json.

    Anybody can repeat the choice by this rule, with H(text) the sha256 of `text` in hexadecimal:
      1. Sort the images by H(f"{seed} {image_id}"), and take the first `count`.
      2. Take the caption of each image with the lowest H(f"{seed} {image_id} {caption_id}").
      3. Reduce whitespace in a caption to single spaces between words.
    So a smaller `count` gives the first prompts of a larger one, and each count a random choice.
    The reference set is the same images, `file_name` in the records (lml/export.py makes it).
    """
    label = f"prompts.file={file}"
    content = _read(locate(file), label)
    try:
        content = load_json(content)
        if isinstance(content, dict) and "annotations" not in content:
            raise ValueError("no 'annotations'; for {key: caption} use prompts=captions")
        names = {image["id"]: image["file_name"] for image in content["images"]}
        others = [name for i, name in names.items() if name != f"COCO_val2014_{i:012d}.jpg"]
        captions: dict[int, list[tuple[int, str]]] = {}
        for annotation in content["annotations"]:
            if caption := " ".join(annotation["caption"].split()):
                captions.setdefault(annotation["image_id"], []).append((annotation["id"], caption))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{label}: expected captions_val2014.json of MS-COCO ({reason})") from None
    if others:
        raise UserError(f"{label}: not of val2014: it has {others[0]}")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(captions):
        raise UserError(f"prompts.count={count}: {label} has captions of {len(captions)} images")
    if missing := captions.keys() - names.keys():
        raise UserError(f"{label}: captions of image {min(missing)}, which is not among its images")

    def place(*numbers: int) -> str:
        return hashlib.sha256(" ".join(map(str, (seed, *numbers))).encode()).hexdigest()

    entries = []
    for image in sorted(captions, key=place)[:count]:
        number, caption = min(captions[image], key=lambda one: place(image, one[0]))
        entries.append(
            {
                "prompt": caption,
                "image_id": image,
                "caption_id": number,
                "file_name": names[image],
            }
        )
    return _collect("coco14_30k", entries, label)


# --- files -------------------------------------------------------------------------------------


def _collect(source: str, entries: Iterable[Mapping[str, Any]], label: str) -> PromptSet:
    """A PromptSet of the entries with a prompt. UserError, beginning with `label`, without any."""
    kept = []
    for entry in entries:
        if prompt := entry["prompt"].strip():
            kept.append({**entry, "prompt": prompt})
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # JSON can hold these
                raise UserError(f"{label}: {prompt!r} is not text (half a UTF-16 character)")
    if not kept:
        raise UserError(f"{label}: no prompts in it")
    return PromptSet(source, tuple(kept))


def _read(path: Path, label: str) -> str:
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError(f"{label}: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{label}: line {line} is not UTF-8 ({error.reason})") from None


def _lines(content: str) -> list[str]:
    """Lines as editors count them; str.splitlines would also break at form feeds and others."""
    return content.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _read_jsonl(path: Path, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(_read(path, label)), 1):
        if not line.strip():
            continue
        try:
            value = load_json(line)
        except ValueError as error:
            raise UserError(f"{label}: line {number} is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"{label}: line {number} is not a JSON object")
        yield number, value


def _read_csv(path: Path, label: str) -> list[tuple[int, dict[str, str]]]:
    content = _read(path, label)
    try:
        if path.suffix.lower() == ".csv":
            return _rows(content, ",", csv.QUOTE_MINIMAL)
        try:
            return _rows(content, "\t", csv.QUOTE_MINIMAL)
        except csv.Error:  # in PartiPrompts, for example, quotes belong to the prompts
            return _rows(content, "\t", csv.QUOTE_NONE)
    except csv.Error as error:
        raise UserError(f"{label}: {error}") from None


def _rows(content: str, delimiter: str, quoting: int) -> list[tuple[int, dict[str, str]]]:
    lines = io.StringIO(content, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    try:
        header = next(reader, [])
        rows = ((reader.line_num, row) for row in reader if row)
        return [(number, dict(zip(header, row, strict=False))) for number, row in rows]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None
