"""Prompt sets: what is read, in which order, what is saved, and what is refused."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lml.data import prompts
from lml.data.assets import ROOT
from lml.errors import UserError


def composed(*overrides: str, config: str = "sample") -> dict | None:
    """The prompts of a composed configuration."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(config, list(overrides))
    return prompts.load(OmegaConf.to_container(cfg, resolve=True)["prompts"])


def refused(pattern: str, function, *args, **options) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


HARD = [
    'a "quoted" cat, and a dog',
    "tab\there",
    "it's 50% {off} $HOME ${x}",
    "a/b_c\\d",
    "form\ffeed \u2028 next\x85line",
    "日本語 und Ä 🦊",
    " ".join(["word"] * 300),
    "{'json': [1]}",
    "a",
    "a",
]


@pytest.mark.parametrize("config", ["sample", "evaluate", "export"])
def test_no_prompts_is_the_default(config):
    needed = ["layout=t2i_compbench", "out=x"] if config == "export" else []
    assert composed(*needed, config=config) is None


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_files_lines(tmp_path, end, mark):
    (tmp_path / "p.txt").write_bytes((mark + end.join(["", *HARD, "  ", ""])).encode())
    made = composed("prompts=text", f"prompts.file={tmp_path / 'p.txt'}")
    assert made.texts == list(made) == HARD and made[6] == HARD[6] and len(made) == 10
    assert [entry["line"] for entry in made.records] == list(range(2, 12))
    assert [entry["index"] for entry in made.records] == list(range(10))


def test_a_tsv_file_without_quoting(tmp_path):
    """As PartiPrompts.tsv is: what begins with a quote needn't end with one."""
    rows = ['"Hello" on a sign', "a sign", 'the word "START"', '"never closed', 'a "b']
    path = tmp_path / "p.tsv"
    path.write_text("Prompt\tCategory\n" + "".join(f"{row}\tArts\n" for row in rows))
    assert prompts.table(path, "Prompt").texts == rows
    path.write_text("Prompt\tCategory\n" + "x" * 200_000 + '\t"a" b\n')
    refused(rf"^prompts\.file={path}: line 2: field larger", prompts.table, path, "Prompt")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_tables_column(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"n": 1, "what": p}) for p in HARD) + "\n\n")
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerow(["n", "what"])
            writer.writerows([[k, p] for k, p in enumerate(HARD)])
            writer.writerow([99, " "])
    made = composed("prompts=table", f"prompts.file={path}", "prompts.column=what")
    assert made.texts == HARD
    refused(r"^prompts\.column=prompt: not in line .*; it has n, what$", prompts.table, path)


def test_a_quoted_cell_holds_line_breaks(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'prompt,n\r\n"one\r\ntwo",1\r\nthree,2\r\n')
    made = prompts.table(path)
    assert made.texts == ["one\r\ntwo", "three"]
    (tmp_path / "saved.jsonl").write_bytes(made.to_jsonl().encode())
    assert prompts.read(tmp_path / "saved.jsonl").texts == made.texts


def test_a_saved_set_is_read_back_and_its_hash_is_the_files(tmp_path):
    made = prompts.text(_write(tmp_path / "p.txt", "\n".join(HARD)))
    (tmp_path / "prompts.jsonl").write_bytes(made.to_jsonl().encode())
    data = (tmp_path / "prompts.jsonl").read_bytes()
    assert data.count(b"\n") == len(made) and "日本語" in data.decode()
    again = prompts.read(tmp_path / "prompts.jsonl")
    assert again.records == made.records
    expected = {"source": "text", "count": 10, "sha256": hashlib.sha256(data).hexdigest()}
    assert made.settings == expected
    # ... and neither the path nor the encoding of the file plays a part in it.
    other = prompts.text(_write(tmp_path / "q.txt", "\ufeff" + "\r\n".join(HARD)))
    assert other.settings == made.settings
    swapped = prompts.text(_write(tmp_path / "r.txt", "\n".join(HARD[::-1])))
    assert swapped.settings["sha256"] != made.settings["sha256"]


def test_a_slice_is_a_set_and_nothing_can_be_changed_through_one(tmp_path):
    made = prompts.text(_write(tmp_path / "p.txt", "\n".join(HARD)))
    assert made[2:4].texts == HARD[2:4] and made.take(3).texts == HARD[:3] and made[-1] == "a"
    assert made.take(10) == made
    refused(r"^num_images=11: prompts=text has 10$", made.take, 11)
    made.records[0]["prompt"] = "spoilt"
    made.texts[0] = "spoilt"
    assert made[0] == HARD[0]
    with pytest.raises(AttributeError):
        made.source = "x"


def _write(path, content: str):
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("p.txt", b"fine\nd\xe9j\xe0 vu\n", r"p\.txt: line 2 is not UTF-8"),
        ("p.txt", "a\n".encode("utf-16"), r"p\.txt: line 1 is not UTF-8"),
        ("p.txt", b" \n\n", r"p\.txt: no prompts in it"),
        ("p.txt", b"", r"p\.txt: no prompts in it"),
        ("none.txt", None, r"none\.txt: No such file"),
        (".", None, r"Is a directory"),
    ],
)
def test_text_files_that_are_refused(tmp_path, name, content, pattern):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(r"^prompts\.file=.*" + pattern, prompts.text, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("p.csv", b"prompt,n\nd\xe9j\xe0,1\n", r"line 2 is not UTF-8"),
        ("p.csv", b'prompt\n"never closed\n', r"line 2: unexpected end"),
        ("p.csv", b"n,prompt\n1,a\n2\n", r"prompts\.column=prompt: not in line 3"),
        ("p.csv", b"", r"no prompts in it"),
        ("p.csv", b"prompt\n", r"no prompts in it"),
        ("p.csv", b"prompt\n" + b"x" * 200_000, r"field larger"),
        ("p.xlsx", b"PK", r"expected one of \.csv, \.tsv, \.jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', r"line 2 is not JSON"),
        ("p.jsonl", b'["a"]\n', r"line 1 is not a JSON object"),
        ("p.jsonl", b'{"prompt": 3}\n', r"no text in line 1"),
        ("p.jsonl", b'{"prompt": null}\n', r"no text in line 1"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}\n', r"not text"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, content, pattern):
    (tmp_path / name).write_bytes(content)
    refused(pattern, prompts.table, tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json\n",
        b'{"index": 1, "prompt": "a"}\n',
        b'{"index": 0, "prompt": "a"}\n{"index": 2, "prompt": "b"}\n',
        b'{"index": 0}\n',
        b'{"index": 0, "prompt": " "}\n',
    ],
)
def test_a_file_that_no_run_wrote(tmp_path, content):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    refused(r"prompts\.jsonl: (line|no)", prompts.read, tmp_path / "prompts.jsonl")


def test_what_makes_no_prompt_set():
    refused(r"^prompts: .*PromptSet", prompts.load, {"_target_": "builtins.dict"})
    refused(r"^prompts: .*nowhere", prompts.load, {"_target_": "lml.nowhere"})
    config = {"_target_": "lml.data.prompts.text", "fil": "x"}
    refused(r"^prompts: .*fil", prompts.load, config)


# --- MS-COCO -----------------------------------------------------------------------------------


@pytest.fixture
def captions(tmp_path):
    """A captions file of 50 images with three captions each, one of them without any text."""
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(100, 600, 10)]
    annotations = [
        {"id": 7 * k, "image_id": image["id"], "caption": f" A  cat,\n number {k}. \n"}
        for k, image in enumerate(3 * images)
    ]
    annotations.append({"id": 1, "image_id": 100, "caption": " \n"})
    random.Random(0).shuffle(images)
    random.Random(1).shuffle(annotations)
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return path


def test_the_selection_is_the_rule_as_it_is_written_down(captions):
    made = composed("prompts=coco14_30k", f"prompts.file={captions}", "prompts.count=20")
    content = json.loads(captions.read_text())

    def h(text: str) -> int:
        return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")

    order = sorted((h(f"0 {image['id']}"), image["id"]) for image in content["images"])
    for record, (_, image) in zip(made.records, order, strict=False):
        own = [a for a in content["annotations"] if a["image_id"] == image and a["id"] != 1]
        best = min(own, key=lambda a: h(f"0 {image} {a['id']}"))
        assert record["image_id"] == image and record["caption_id"] == best["id"]
        assert record["prompt"] == f"A cat, number {best['id'] // 7}."
        assert record["file_name"] == f"COCO_val2014_{image:012d}.jpg"
    assert len(made) == 20 == len({record["image_id"] for record in made.records})


def test_the_selection_is_always_the_same(captions):
    """Not another for another order in the file, Python or platform: so these are pinned."""
    made = prompts.coco14_30k(captions, count=3)
    assert [record["caption_id"] for record in made.records] == [357, 602, 882]
    content = json.loads(captions.read_text())
    for part in ("images", "annotations"):
        random.Random(2).shuffle(content[part])
    captions.write_text(json.dumps(content, indent=1))
    assert prompts.coco14_30k(captions, count=3) == made
    # a smaller selection is the beginning of a larger one; another seed is another selection
    assert prompts.coco14_30k(captions, count=50)[:3] == made
    assert prompts.coco14_30k(captions, count=3, seed=1) != made


def test_all_30000_are_asked_of_the_official_file(captions):
    composition = ("prompts=coco14_30k", f"prompts.file={captions}")
    refused(r"^prompts\.count=30000: .* has captions of 50 images$", composed, *composition)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda c: c.pop("images"), "expected captions_val2014.json of MS-COCO .no 'images'"),
        (lambda c: c.pop("annotations"), "no 'annotations'"),
        (lambda c: c["annotations"][5].pop("caption"), "no 'caption'"),  # instances_val2014.json
        (lambda c: c["annotations"][5].update(caption=3), "expected captions_val2014"),
        (lambda c: c["images"][3].update(file_name="000000000139.jpg"), "not of val2014"),
        (lambda c: c["images"][3].update(id="7"), "expected captions_val2014"),
        (lambda c: c["images"][3].update(id=[7]), "expected captions_val2014"),
        (lambda c: c["annotations"][0].update(image_id=3), "captions of image 3, which is not"),
        (lambda c: c.update(images=3), "expected captions_val2014"),
    ],
)
def test_captions_files_that_are_refused(captions, change, pattern):
    content = json.loads(captions.read_text())
    change(content)
    captions.write_text(json.dumps(content))
    refused(rf"^prompts\.file=.*{pattern}", prompts.coco14_30k, captions, count=5)


def test_more_captions_files_that_are_refused(captions, tmp_path):
    whole = captions.read_text()
    for text, pattern in ((whole[:500], "expected"), ("[]", "expected"), ("7", "expected")):
        captions.write_text(text)
        refused(rf"^prompts\.file=.*{pattern}", prompts.coco14_30k, captions, count=5)
    refused(r"^prompts\.file=.*No such file", prompts.coco14_30k, tmp_path / "none.json")
    captions.write_text(whole)
    for count in (0, -1, 51, "all", 2.5, True):
        refused(rf"^prompts\.count={count}: ", prompts.coco14_30k, captions, count=count)


# --- {key: caption} ----------------------------------------------------------------------------


def test_the_captions_of_a_file_of_the_authors(tmp_path):
    keys = ["000000009", "1", "b", "a", "10", "2"]
    written = {key: f" a cat, number {key}.\n" for key in keys} | {"again": "a cat, number 1."}
    path = _write(tmp_path / "p.json", "\ufeff" + json.dumps(written))
    made = composed("prompts=captions", f"prompts.file={path}")
    assert made.texts == [f"a cat, number {key}." for key in keys] + ["a cat, number 1."]
    assert [record["key"] for record in made.records] == [*keys, "again"]
    (tmp_path / "prompts.jsonl").write_bytes(made.to_jsonl().encode())
    assert prompts.read(tmp_path / "prompts.jsonl").records == made.records


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ('["a cat"]', r"expected an object of JSON, \{key: caption\}$"),
        ("7", r"expected an object of JSON, \{key: caption\}$"),
        ('{"1": "a', r"expected JSON, \{key: caption\} \("),
        (1000 * "[", r"expected JSON, \{key: caption\} \("),
        ("{}", r"no prompts in it$"),
        ('{"1": "a", "2": 3}', r"the caption of '2' is no text; expected \{key: caption\}$"),
        ('{"1": "a", "2": null}', r"the caption of '2' is no text"),
        ('{"1": {"caption": "a"}}', r"the caption of '1' is no text"),
        ('{"1": "a", "2": " \\n"}', r"the caption of '2' is empty"),
        ('{"1": "a", "2": "b", "1": "a"}', r"\(the key '1' twice\)$"),
        ('{"images": [], "annotations": []}', r"has annotations, .* use prompts=coco14_30k$"),
        ('{"1": "\\ud83d"}', "not text"),
        (f'{{"{500 * "x"}": 3}}', "is no text"),
    ],
)
def test_captions_of_neither_kind(tmp_path, content, pattern):
    path = _write(tmp_path / "p.json", content)
    refused(rf"^prompts\.file={path}: .*{pattern}", prompts.captions, path)


def test_each_kind_of_captions_names_the_other(captions, tmp_path):
    path = _write(tmp_path / "p.json", '{"1": "a cat"}')
    refused(
        r"\(no 'annotations'; for \{key: caption\} use prompts=captions\)$",
        prompts.coco14_30k,
        path,
    )
    refused(r"use prompts=coco14_30k$", prompts.captions, captions)


# --- T2I-CompBench -----------------------------------------------------------------------------

CATEGORIES = ["color", "shape", "texture", "spatial", "non_spatial", "complex"]


@pytest.fixture
def benchmark(tmp_path):
    """The benchmark's repository, with two prompts a category."""
    folder = tmp_path / "T2I-CompBench/examples/dataset"
    folder.mkdir(parents=True)
    for category in CATEGORIES:
        text = f"a {category} bench\tnote\n\nA {category} cat. \n"
        (folder / f"{category}_val.txt").write_text(text)
        (folder / f"{category}_train.txt").write_text("not this\n")
    return tmp_path / "T2I-CompBench"


def test_every_prompt_so_many_times_in_the_benchmarks_order(benchmark):
    made = composed("prompts=t2i_compbench", f"prompts.path={benchmark}")
    assert made == prompts.t2i_compbench(benchmark / "examples/dataset", CATEGORIES)
    assert len(made) == 6 * 2 * 10
    expected = [
        (category, index, sample)
        for category in CATEGORIES
        for index in range(2)
        for sample in range(10)
    ]
    keys = ("category", "prompt_index", "sample")
    assert [tuple(r[key] for key in keys) for r in made.records] == expected
    for record in made.records:
        ends = (f"a {record['category']} bench", f"A {record['category']} cat.")
        assert record["prompt"] == ends[record["prompt_index"]]
    few = ("prompts.categories=[spatial]", "prompts.samples_per_prompt=1")
    made = composed("prompts=t2i_compbench", f"prompts.path={benchmark}", *few)
    assert made.texts == ["a spatial bench", "A spatial cat."]


def test_benchmarks_that_are_refused(benchmark, tmp_path):
    make = prompts.t2i_compbench
    refused(r"^prompts\.path=nowhere: no folder with", make, "nowhere", CATEGORIES)
    known = ", ".join(sorted(CATEGORIES))
    for name in ("colour", "numeracy", "../color", ""):
        message = rf"^prompts\.categories=\[{name}\]: no {name}_val.txt in .*; it has {known}$"
        refused(message, make, benchmark, ["color", name])
    message = r"^prompts\.categories: color twice; expected each once$"
    refused(message, make, benchmark, ["color", "shape", "color"])
    refused(r"^prompts\.samples_per_prompt=0: ", make, benchmark, ["color"], 0)
    refused(r"^prompts\.path=.*: no prompts in it", make, benchmark, [])
    file = benchmark / "examples/dataset/color_val.txt"
    file.write_bytes(b"a\n\xff\n")
    refused(r"color_val\.txt: line 2 is not UTF-8", make, benchmark, ["color"])


# --- the prompts of a folder of images ---------------------------------------------------------


def test_a_runs_own_prompts_come_first(tmp_path):
    (tmp_path / "run/images").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    given = {"_target_": "lml.data.prompts.text", "file": str(tmp_path / "p.txt")}
    _write(tmp_path / "p.txt", "a\nb\n")
    images = tmp_path / "run/images"
    assert prompts.find_texts(images) is None and prompts.find_texts(images, {}) is None
    assert (
        prompts.find_texts(images, given)
        == ["a", "b"]
        == prompts.find_texts(tmp_path / "plain", given)
    )
    made = prompts.text(_write(tmp_path / "q.txt", "x\ny\n"))
    (tmp_path / "run/prompts.jsonl").write_text(made.to_jsonl())
    assert prompts.find_texts(images) == prompts.find_texts(images, {}) == ["x", "y"]
    refused(
        r"^prompts: images=.* were made from the prompts in .*prompts\.jsonl",
        prompts.find_texts,
        images,
        given,
    )
    _write(tmp_path / "p.txt", "x\ny\n")
    assert prompts.find_texts(images, given) == ["x", "y"]


def test_bad_prompts_are_one_line_of_the_script(script, tmp_path):
    for arguments, pattern in (
        (["prompts=text"], r"^prompts\.file=\?\?\?: a value is needed"),
        (["prompts=text", "prompts.file=none.txt"], r"^prompts\.file=none\.txt: No such file"),
        (["prompts=txt"], r"^prompts=txt: unknown; nearest: text"),
        (["prompts.file=none.txt"], r"prompts"),
    ):
        outcome = script("evaluate", "images=.", "metrics=none", *arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
        assert re.search(pattern, outcome.err), outcome.err
