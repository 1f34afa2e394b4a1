"""What a ControlNet follows: a given image, or a map that is made from a photograph.

The maps are those of the authors' scripts: Canny edges by OpenCV, depth by a model of transformers,
an OpenPose skeleton by controlnet_aux. All are made on the CPU, in float32.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as F

from lml.data.assets import locate
from lml.data.images import read
from lml.errors import UserError
from lml.files import file_hash, weights_hash
from lml.pipelines import loading

GROUP = "model.control_map"
INSTALL = "`pip install -e '.[control]'`"
# The package of the extra `control` that each kind of map needs: its names to install and import.
PACKAGES = {
    "canny": ("opencv-python-headless", "cv2"),
    "pose": ("controlnet_aux", "controlnet_aux"),
}
THRESHOLDS = (100, 200)  # of Canny's edges
PROCESSOR = "preprocessor_config.json"
POSE = "body_pose_model.pth"
# A DPT's first fusion layer gets no residual, so its checkpoints have no residual layer there.
UNUSED = r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*"


@dataclass(frozen=True)
class Control:
    """The image that a ControlNet follows, or the photograph that its map is made from.

    `settings` identify it independently of its path. `make` turns the photograph, cropped to the
    images' size, into the map of that size. None: the image is the map.
    """

    key: str
    path: str
    settings: dict[str, Any]
    make: Callable[[Image.Image], Image.Image] | None = None

    def at(self, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The map and the photograph (None without one), uint8 (3, H, W) of `size` (H, W).

        The photograph is its largest centre crop. UserError if a given map has another size, or if
        no map can be made.
        """
        pixels, (height, width) = read_pixels(self.path, self.key), size
        if self.make is None:
            h, w = pixels.shape[1:]
            if (h, w) != size:
                raise UserError(
                    f"{self.key}={self.path}: {w}x{h} pixels; expected {width}x{height}, the "
                    "images' size (model.width, model.height)"
                )
            return pixels, None
        photo = ImageOps.fit(F.to_pil_image(pixels), (width, height), Image.Resampling.BICUBIC)
        try:
            with _one_thread():
                made = self.make(photo)
        except UserError:
            raise
        except Exception as error:  # the packages' errors share no base class
            reason = loading.one_line(error)
            raise UserError(f"{self.key}={self.path}: no map could be made ({reason})") from None
        return F.pil_to_tensor(made.convert("RGB")), F.pil_to_tensor(photo)


def find_control(config: Mapping[str, Any]) -> Control:
    """What the ControlNet of the model `config` follows. Its networks are found, not loaded.

    UserError unless exactly one of `control_image` and `control_photo` is given. For a photograph,
    also UserError if the package or the network of `control_map` is missing.
    """
    image, photo = config.get("control_image"), config.get("control_photo")
    if image is not None and photo is not None:
        raise UserError(
            f"model.control_photo={photo}: model.control_image is also given; give one of them"
        )
    if photo is None:
        if config.get("strength") is not None:
            raise UserError(
                "model.control_photo=null: expected the photograph that the steps begin with "
                "(model.strength)"
            )
        if image is None:
            raise UserError(
                "model.control_image=null: expected the image that the ControlNet follows, or "
                "model.control_photo, a photograph to make it from"
            )
        return Control("model.control_image", image, {"control_image": image_hash(image)})
    key = "model.control_photo"
    kind = (config.get("control_map") or {}).get("kind")
    if kind is None:
        raise UserError(f"{GROUP}.kind=null: expected the map of {key}: canny, depth or pose")
    settings = {"control_photo": image_hash(photo, key)}
    if kind in PACKAGES and importlib.util.find_spec(PACKAGES[kind][1]) is None:
        raise UserError(f"{key}={photo}: needs {PACKAGES[kind][0]}: {INSTALL}")
    make, network = {"canny": _find_canny, "depth": _find_depth, "pose": _find_pose}[kind](config)
    return Control(key, photo, {**settings, "control_map": {"kind": kind, **network}}, make)


def image_hash(path: str, key: str = "model.control_image") -> str:
    """sha256 of the pixels of an image file. UserError, naming `key`, if it is not an image."""
    return hashlib.sha256(read_pixels(path, key).numpy().tobytes()).hexdigest()


def read_pixels(path: str, key: str) -> Tensor:
    """An image file, uint8 (3, H, W), upright. UserError, naming `key`, if it is not an image."""
    file = locate(path)
    if not file.is_file():
        raise UserError(f"{key}={path}: no such file")
    try:
        return read(file, upright=True)  # as diffusers.utils.load_image reads it
    except UserError as error:
        raise UserError(f"{key}={error}") from None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, for the same map in every process: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# The functions below return the function that makes the map, and the settings that identify it.
Found = tuple[Callable[[Image.Image], Image.Image], dict[str, Any]]


def _find_canny(config: Mapping[str, Any]) -> Found:
    return _draw_edges, {"thresholds": list(THRESHOLDS)}


def _draw_edges(photo: Image.Image) -> Image.Image:
    import cv2

    return Image.fromarray(cv2.Canny(np.array(photo), *THRESHOLDS))


def _find_depth(config: Mapping[str, Any]) -> Found:
    place = config["control_map"]
    key = loading.describe_key(place, GROUP)
    patterns = ["*.json", "*.safetensors", "*.bin"]
    if place.get("use_safetensors", True):
        patterns.remove("*.bin")
    folder = loading.find_folder(
        place, GROUP, snapshot_download, "a depth model of transformers", allow_patterns=patterns
    )
    weights = loading.find_weights(folder, key, place, GROUP)
    if not (folder / PROCESSOR).is_file():
        raise UserError(f"{key}: no {PROCESSOR} in it")
    settings = {"network": weights.sha256, "processor": file_hash(folder / PROCESSOR)}
    return partial(_draw_depth, weights, key), settings


def _draw_depth(weights: loading.Weights, key: str, photo: Image.Image) -> Image.Image:
    import transformers

    # neither `read_network` nor the next call runs code of the model
    cls = transformers.AutoModelForDepthEstimation
    network = loading.read_network(cls, weights, torch.float32, key, unused=UNUSED)
    processor = transformers.AutoImageProcessor.from_pretrained(
        weights.folder, local_files_only=True, trust_remote_code=False
    )
    pipe = transformers.DepthEstimationPipeline(
        model=network.eval(), image_processor=processor, device="cpu"
    )
    return pipe(photo)["depth"]


def _find_pose(config: Mapping[str, Any]) -> Found:
    place = config["control_map"]
    key = loading.describe_key(place, GROUP)
    folder = loading.find_folder(
        place, GROUP, snapshot_download, f"{POSE} of OpenPose", allow_patterns=[POSE]
    )
    if not (folder / POSE).is_file():
        raise UserError(f"{key}: no {POSE} in it")
    return partial(_draw_pose, folder / POSE, key), {"network": weights_hash(folder / POSE)}


def _draw_pose(file: Path, key: str, photo: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import loads all detectors; some are deprecated
        from controlnet_aux.open_pose import Body, OpenposeDetector
    try:
        body = Body(str(file))  # torch reads only tensors from it
    except Exception as error:  # of pickle or torch, or missing names
        reason = loading.one_line(error)
        raise UserError(f"{key}: {POSE} cannot be read ({reason})") from None
    # it resizes to at least 512 pixels, and draws in that size
    return OpenposeDetector(body)(photo).resize(photo.size, Image.Resampling.BICUBIC)
