from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lml.data.assets import ROOT, locate
from lml.data.images import ImageFolder
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
    with pytest.raises(UserError, match=rf"{file.name}: pixels of type {mode}; one of RGB"):
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
    with pytest.raises(UserError, match="a file; a folder of images is asked"):
        ImageFolder(tmp_path / "file")


def test_locate_prefers_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("lml/errors.py") == ROOT / "lml/errors.py"
    assert locate(ROOT / "lml") == ROOT / "lml"
    (tmp_path / "lml").mkdir()
    (tmp_path / "lml/errors.py").touch()
    assert locate("lml/errors.py").resolve() == tmp_path.resolve() / "lml/errors.py"
