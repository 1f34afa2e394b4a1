"""Networks of the transformers library behind metrics: finding, loading and feeding them."""

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

# What config.json calls the models that a class can be read from.
MODEL_TYPES = {
    "CLIPModel": ("clip",),
    "CLIPVisionModelWithProjection": ("clip", "clip_vision_model"),
    "Dinov2Model": ("dinov2",),
}


@dataclass(frozen=True)
class Preprocessing:
    """Makes a network's input, float32 (B, 3, `size`, `size`), of uint8 images (B, 3, H, W).

    Resized by Pillow from uint8 to uint8 with its antialiased bicubic filter, then normalised by
    `mean` and `std` of pixels in [0, 1]. `crop`, a key of CROPS, says what happens to images that
    are no squares.
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
        """For protocols."""
        return f"{CROPS[self.crop]}, to {self.size}x{self.size} (Pillow, bicubic, uint8)"


def import_transformers(key: str) -> ModuleType:
    """The library, imported when it is first needed. UserError, naming `key`, without it."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{key}: needs the package transformers; `pip install transformers`"
        ) from None
    return transformers


def find(source: str | Path, revision: str | None, key: str, files: Sequence[str]) -> Path:
    """The folder of `source`: a folder of that name or, if there is none, a model on the hub.

    Of a hub model only `files` (patterns) are fetched, and nothing when HF_HUB_OFFLINE is set and
    they were fetched before. UserError, beginning with `key`, when there is neither.
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
    """The transformers model of class `kind`, one of MODEL_TYPES, in `source`.

    It is float32, and to be evaluated, not trained.

    `pickled` is for models that are published without safetensors: then pytorch_model.bin is read,
    as tensors alone (`weights_only`), where there are none. No code of the model's is ever run.
    UserError, beginning with `key`, when it isn't there or its weights are not whole.
    """
    library = import_transformers(key)
    weights = ["*.safetensors", "pytorch_model*.bin"][: 1 + pickled]
    folder = find(source, revision, key, ["*.json", *weights])
    found = [pattern for pattern in weights if list(folder.glob(pattern))]
    if not found:
        names = " or ".join(weights)
        raise UserError(f"{key}={source}: no {names} in {folder}; the weights of {kind} are asked")
    try:
        model_type = read_object(folder / "config.json").get("model_type")
    except (FileNotFoundError, UserError):
        raise UserError(f"{key}={source}: no model's config.json in {folder}") from None
    if model_type not in MODEL_TYPES[kind]:
        raise UserError(f"{key}={source}: a {model_type}; {MODEL_TYPES[kind][0]} is asked")
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
    for problem in ("missing", "mismatched"):  # what else the file holds changes nothing
        for name in report[f"{problem}_keys"]:
            raise UserError(f"{key}={source}: not the weights of {kind} ({problem}: {name})")
    return network.float().eval().requires_grad_(False)


def load_tokenizer(source: str | Path, revision: str | None, key: str) -> Any:
    """The tokenizer in `source`. UserError, beginning with `key`, when there is none."""
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
    """`input_ids` and `attention_mask` (B, `length`) of prompts, and how many had to be cut.

    What is cut keeps its closing token.
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
    """Where weights came from, for protocols: a hub id and revision, or a folder's name."""
    folder = locate(source)
    return {"source": folder.name if folder.exists() else str(source), "revision": revision}


@contextlib.contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """What transformers warns of is an error here, or nothing; and no progress bar."""
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
    """The message of anybody's error, as a part of one line of ours."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
