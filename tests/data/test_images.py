from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from PIL import Image

from lml.data.assets import ROOT, locate
from lml.data.images import ImageFolder, ImageZip, read
from lml.errors import UserError


def save(path, pixels, mode=None):
    Image.fromarray(pixels, mode).save(path)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pixels):
    for index in (3, 0, 4, 1, 2):
        save(tmp_path / f"{index:03d}.png", pixels[index])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".004.png.partial").write_text("half an image")
    (tmp_path / "._005.png").write_text("what some systems leave beside an image")
    return tmp_path


def test_pixels_come_back_exactly_sorted_by_name(folder, pixels):
    images = ImageFolder(folder)
    assert images.names == [f"{index:03d}.png" for index in range(5)]
    assert (len(images), images.size) == (5, (6, 8))
    batches = list(images.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(batch.dtype == torch.uint8 for batch in batches)
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), pixels)


def test_batches_are_read_only_when_they_are_asked_for(folder):
    batches = ImageFolder(folder).batches(2)
    (folder / "004.png").write_bytes(b"")
    assert len(next(batches)) == len(next(batches)) == 2
    with pytest.raises(UserError, match=r"004\.png: not a readable image"):
        next(batches)


def test_grey_and_palette_images_become_rgb(tmp_path, pixels):
    grey = Image.fromarray(pixels[0, :, :, 0])
    grey.save(tmp_path / "grey.png")
    grey.convert("P").save(tmp_path / "palette.png")
    images = ImageFolder(tmp_path).load(["grey.png", "palette.png"])
    assert (images == torch.from_numpy(pixels[0, :, :, 0])).all()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.3, 0.8])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "003.png"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=rf"^{path}: not a readable image"):
        list(ImageFolder(folder).batches(5))


def test_a_file_with_a_flipped_bit_is_named(folder):
    path = folder / "003.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"^{path}: not a readable image"):
        list(ImageFolder(folder).batches(5))


def test_an_image_of_another_size_is_named(folder, pixels):
    save(folder / "003.png", pixels[3, :, :6])
    message = r"003\.png: 6x6 pixels; all images must have the 8x6 of 000\.png$"
    with pytest.raises(UserError, match=message):
        list(ImageFolder(folder).batches(2))


@pytest.mark.parametrize("mode", ["I;16", "CMYK"])
def test_more_than_8_bits_of_rgb_is_refused(folder, mode):
    file = folder / ("003.jpg" if mode == "CMYK" else "003.png")
    Image.new(mode, (8, 6)).save(file)
    with pytest.raises(
        UserError, match=rf"{file.name}: pixels of type {mode}; expected one of RGB"
    ):
        list(ImageFolder(folder).batches(2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_behind_a_transparent_pixel_nobody_knows(tmp_path, pixels, mode):
    """But an alpha channel, as screenshots have one, that hides nothing is none."""
    image = Image.fromarray(pixels[0]).convert("L" if mode == "LA" else "RGB")
    expected = np.asarray(image.convert("RGB"))
    if mode == "P":
        image = Image.fromarray(pixels[0, :, :, 0]).convert("P")
        expected = np.asarray(image.convert("RGB"))
    else:
        image.putalpha(255)
    assert image.mode == mode
    image.save(tmp_path / "image.png")
    made = ImageFolder(tmp_path).load(["image.png"])[0].permute(1, 2, 0)
    assert (made.numpy() == expected).all()
    if mode == "P":
        image.save(tmp_path / "image.png", transparency=int(np.asarray(image)[0, 0]))
    else:
        image.putpixel((0, 0), (*image.getpixel((0, 0))[:-1], 254))
        image.save(tmp_path / "image.png")
    with pytest.raises(UserError, match=r"image\.png: transparent in places"):
        ImageFolder(tmp_path)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match=rf"^images={tmp_path}: no images in it \(\.png, "):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match=rf"^images={tmp_path / 'none'}: no such folder$"):
        ImageFolder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file; expected a folder of images"):
        ImageFolder(tmp_path / "file")


def test_locate_prefers_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("lml/errors.py") == ROOT / "lml/errors.py"
    assert locate(ROOT / "lml") == ROOT / "lml"
    (tmp_path / "lml").mkdir()
    (tmp_path / "lml/errors.py").touch()
    assert locate("lml/errors.py").resolve() == tmp_path.resolve() / "lml/errors.py"


def test_locate_of_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    assert locate("~/a") == tmp_path / "a"
    assert not locate("~nobody-of-this-name/a").exists()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_only_what_a_model_follows_is_turned_upright(tmp_path, pixels, suffix, orientation):
    """As diffusers turns it; sets that are compared stay as they are stored, as in FID's tools."""
    file, plain = tmp_path / f"turned{suffix}", tmp_path / f"plain{suffix}"
    image, exif = Image.fromarray(pixels[0]), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, exif=exif)
    image.save(plain)
    turned = torch.from_numpy(np.array(load_image(str(file)))).permute(2, 0, 1)
    assert torch.equal(read(file, upright=True), turned)
    stored = torch.from_numpy(np.array(Image.open(plain))).permute(2, 0, 1)
    assert torch.equal(turned, stored) == (orientation == 1)
    assert torch.equal(read(file), stored)
    assert torch.equal(ImageFolder(tmp_path).load([file.name])[0], stored)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(file, file.name)
    assert torch.equal(ImageZip(tmp_path / "images.zip").load([file.name])[0], stored)


# --- what is left out --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (["a.gif"], "1 file is left out: 1 .gif"),
        (["a.GIF", "b.gif"], "2 files are left out: 2 .gif"),
        (["a.tif", "b.tiff", "c.jfif"], "3 files are left out: 1 .jfif, 1 .tif, 1 .tiff"),
        (["a.heic", "b.npy", "c"], "3 files are left out: 1 .heic, 1 .npy, 1 without a suffix"),
        (["in/a.png"], "1 file is left out: 1 in sub-folders"),
        (["in/a.png", "in/deep/b.gif"], "2 files are left out: 2 in sub-folders"),
        (["a.gif", "in/a.jpg", "in/notes.txt"], "2 files are left out: 1 .gif, 1 in sub-folders"),
    ],
    ids=" ".join,
)
def test_files_that_are_left_out_are_counted(folder, others, says):
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("an image of some kind")
    images = ImageFolder(folder, "reference")
    assert images.names == [f"{index:03d}.png" for index in range(5)]
    assert images.left_out.total() == sum(not name.endswith(".txt") for name in others)
    line = images.describe_left_out()
    assert line.startswith(f"reference={folder}: 5 images (.png, ") and line.endswith(says)


def test_what_nobody_takes_for_an_image_is_not_counted(folder):
    for name in ("metrics.json", "Thumbs.db", ".hidden.gif", ".git/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "empty").mkdir()
    images = ImageFolder(folder)
    assert not images.left_out and images.describe_left_out() is None


def test_a_zip_counts_what_it_leaves_out_too(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("in/", "")
        archive.write(folder / "000.png", "in/000.png")
        for name in ("in/a.gif", "b.jfif", "labels.json", "__MACOSX/in/a.gif"):
            archive.writestr(name, "something")
    images = ImageZip(tmp_path / "images.zip")
    assert images.names == ["in/000.png"]
    assert images.describe_left_out().endswith("2 files are left out: 1 .gif, 1 .jfif")


def test_a_folder_whose_images_are_in_sub_folders(folder, tmp_path):
    (tmp_path / "sets/test").mkdir(parents=True)
    (folder / "000.png").rename(tmp_path / "sets/test/000.png")
    (folder / "001.png").rename(tmp_path / "sets/test/001.png")
    message = (
        rf"^reference={tmp_path / 'sets'}: no images in it .*left out: 2 in sub-folders, as in "
    )
    with pytest.raises(UserError, match=rf"{message}{tmp_path / 'sets/test'}$"):
        ImageFolder(tmp_path / "sets", "reference")
    (tmp_path / "gifs").mkdir()
    (tmp_path / "gifs/a.gif").touch()
    with pytest.raises(UserError, match=r"no images in it \(.*\); left out: 1 \.gif$"):
        ImageFolder(tmp_path / "gifs")
