"""Networks of the transformers library: finding and loading them, and making their inputs."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from lml.data.assets import locate
from lml.errors import UserError
from lml.files import read_object

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS = {
    "last": "shorter side resized, then the central square",
    "first": "central square, then resized",
    "none": "resized to a square",
}

# The `model_type` in config.json of the models that a class can load.
MODEL_TYPES = {
    "CLIPModel": ("clip",),
    "CLIPVisionModelWithProjection": ("clip", "clip_vision_model"),
    "Dinov2Model": ("dinov2",),
}


@dataclass(frozen=True)
class Preprocessing:
    """Turns uint8 images (B, 3, H, W) into a network's input, float32 (B, 3, `size`, `size`).

    Pillow resizes the images from uint8 to uint8 with its antialiased bicubic filter. Then they are
    normalised by the `mean` and `std` of pixels in [0, 1]. `crop`, a key of CROPS, says how images
    become square.
    """

    size: int
    crop: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        resized = [self._resize(F.to_pil_image(image)) for image in images.cpu()]
        x = torch.stack([F.pil_to_tensor(image) for image in resized]).to(images.device)
        return F.normalize(x / 255, self.mean, self.std)

    def _resize(self, image: Image.Image) -> Image.Image:
        shape = (self.size, self.size)
        if self.crop == "last":
            image = F.resize(image, self.size, InterpolationMode.BICUBIC)
            return F.center_crop(image, shape)
        if self.crop == "first":
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            image = image.crop((left, top, left + side, top + side))
        return F.resize(image, shape, InterpolationMode.BICUBIC)

    def __str__(self) -> str:
        """A description for protocols."""
        return f"{CROPS[self.crop]}, to {self.size}x{self.size} (Pillow, bicubic, uint8)"


def import_transformers(key: str) -> ModuleType:
    """The library, imported when it is needed. UserError, which names `key`, without it."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{key}: needs the package transformers; `pip install transformers`"
        ) from None
    return transformers


def find(source: str | Path, revision: str | None, key: str, files: Sequence[str]) -> Path:
    """The folder of `source`: the folder of that name or, if there is none, a model on the hub.

    Only the `files` (patterns) of a hub model are fetched. With HF_HUB_OFFLINE set, nothing is
    fetched; files that were fetched before are used. UserError, which begins with `key`, if there
    is neither.
    """
    folder = locate(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise UserError(f"{key}={source}: not there, and not a hub id")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the hub's errors and the network's share no base class
        raise UserError(
            f"{key}={source}: not there, and the hub does not give it ({one_line(error)}); get "
            f"it elsewhere with `hf download {source} --local-dir FOLDER` and give {key}=FOLDER"
        ) from None


def load_network(
    kind: str, source: str | Path, revision: str | None, key: str, pickled: bool = False
) -> nn.Module:
    """The transformers model of class `kind` in `source`, as float32.

    It is in evaluation mode, without gradients. `kind` is a key of MODEL_TYPES. `pickled` is for
    models that are published without safetensors: if there are none, pytorch_model.bin is read,
    tensors alone (`weights_only`). No code that comes with a model is ever run. UserError, which
    begins with `key`, if the model is not there or its weights are not complete.
    """
    library = import_transformers(key)
    weights = ["*.safetensors", "pytorch_model*.bin"][: 1 + pickled]
    folder = find(source, revision, key, ["*.json", *weights])
    found = [pattern for pattern in weights if list(folder.glob(pattern))]
    if not found:
        names = " or ".join(weights)
        raise UserError(f"{key}={source}: no {names} in {folder}; expected the weights of {kind}")
    try:
        model_type = read_object(folder / "config.json").get("model_type")
    except (FileNotFoundError, UserError):
        raise UserError(f"{key}={source}: no model's config.json in {folder}") from None
    if model_type not in MODEL_TYPES[kind]:
        raise UserError(f"{key}={source}: a {model_type}; expected a {MODEL_TYPES[kind][0]}")
    try:
        with _quiet(library):
            network, report = getattr(library, kind).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=found[0] == weights[0],
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # safetensors, pickle, JSON and shape errors share no base class
        raise UserError(f"{key}={source}: {kind} cannot be read ({one_line(error)})") from None
    for problem in ("missing", "mismatched"):  # other weights in the file are not used
        for name in report[f"{problem}_keys"]:
            raise UserError(f"{key}={source}: not the weights of {kind} ({problem}: {name})")
    return network.float().eval().requires_grad_(False)


def load_tokenizer(source: str | Path, revision: str | None, key: str) -> Any:
    """The tokenizer in `source`. UserError, which begins with `key`, if there is none."""
    library = import_transformers(key)
    folder = find(source, revision, key, ["*.json", "*.txt"])
    try:
        with _quiet(library):
            return library.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise UserError(f"{key}={source}: no tokenizer in it ({one_line(error)})") from None


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[dict[str, Tensor], int]:
    """`input_ids` and `attention_mask` (B, `length`) of prompts, and how many prompts were cut.

    A prompt that is cut keeps its closing token.
    """
    whole = tokenizer(list(prompts), verbose=False)["input_ids"]
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    return dict(tokens), sum(len(ids) > length for ids in whole)


def describe_source(source: str | Path, revision: str | None) -> dict[str, str | None]:
    """The origin of weights, for protocols: a hub id and a revision, or the name of a folder."""
    folder = locate(source)
    return {"source": folder.name if folder.exists() else str(source), "revision": revision}


@contextlib.contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """No warnings and no progress bar: what matters becomes an error of ours."""
    logging = library.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """The message of any error, short enough to be part of one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
