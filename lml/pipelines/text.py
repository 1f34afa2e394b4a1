"""Text-to-image models through diffusers' own pipelines, with or without a ControlNet."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging
from torch import Tensor, nn

from lml.errors import UserError, first_line
from lml.files import read_bytes, read_object
from lml.instances import SCHEDULERS
from lml.pipelines import loading
from lml.pipelines.control import Control, find_control
from lml.schema import PipelineIndex

# The libraries that the classes of a pipeline's parts may come from.
LIBRARIES = ("diffusers", "transformers", *SCHEDULERS[1:])
# These parts check finished images or encode image prompts. We use neither.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
INSTALL = "`pip install -e '.[text]'`"
# transformers needs these to read a SentencePiece model: the name to install, the name to import.
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


@dataclass
class TextModel:
    """A text-to-image pipeline whose files were found and are not loaded yet.

    `settings` identify the model, whatever its path is; `scheduler` holds its noise schedule.
    """

    name: str
    settings: dict[str, Any]
    scheduler: SchedulerMixin
    config: Mapping[str, Any]
    folder: Path
    pipeline: type[DiffusionPipeline]
    networks: Mapping[str, loading.Weights]
    controlnet: loading.Weights | None = None
    control: Control | None = None
    has_latents: ClassVar[bool] = True

    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images; None if it is not known before the network is loaded."""
        latents = loading.sample_size(self.folder / _denoiser(self.folder))
        factor = loading.decoder_factor(self.folder / "vae")
        own = (None, None) if latents is None else (latents[0] * factor, latents[1] * factor)
        size = self.config.get("height") or own[0], self.config.get("width") or own[1]
        return None if None in size else size

    def sampler(
        self, device: torch.device, dtype: torch.dtype, channels_last: bool, compile: bool
    ) -> TextSampler:
        """Load the pipeline, and return the sampler. UserError if its files don't make one."""
        config, key = self.config, loading.describe_key(self.config)
        offload = config.get("cpu_offload")
        if offload and device.type == "cpu":
            raise UserError("model.cpu_offload=true: expected an accelerator; use device=cuda")
        if offload and not _is_installed("accelerate"):
            raise UserError(f"model.cpu_offload=true: needs accelerate: {INSTALL}")
        _be_quiet(self.name)
        parts = {"scheduler": self.scheduler, **_left_out(self.pipeline)}
        classes = _networks(self.folder)
        for name, weights in self.networks.items():
            cls = _class(*classes[name], f"{key}: its {name}")
            parts[name] = loading.read_network(cls, weights, dtype, f"{key}: {name}")
        if self.controlnet is not None:
            control_key = loading.describe_key(config["controlnet"], "model.controlnet")
            cls = _control_class(self.controlnet.folder, control_key)
            parts["controlnet"] = loading.read_network(cls, self.controlnet, dtype, control_key)
        try:
            pipe = self.pipeline.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False, **parts
            )
        except Exception as error:  # tokenizers' and diffusers' errors share no base class
            if reason := _tokenizer_reason(self.folder, error):
                raise UserError(f"{key}: {reason}") from None
            reason = loading.one_line(error)
            raise UserError(f"{key}: makes no {self.pipeline.__name__} ({reason})") from None
        pipe.set_progress_bar_config(disable=True)
        name = _denoiser(self.folder)
        for part in {name, "vae"}:
            loading.lay_out(getattr(pipe, part), device, channels_last)
        if config.get("slicing"):
            pipe.enable_attention_slicing()
            pipe.vae.enable_slicing()
        if compile:
            setattr(pipe, name, torch.compile(getattr(pipe, name)))
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        return TextSampler(pipe, getattr(pipe, name), config, self.control)


class TextSampler:
    """Makes images from seeds and prompts; see `lml.pipelines.pixel.PixelSampler`."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        network: nn.Module,
        config: Mapping[str, Any],
        control: Control | None = None,
    ):
        self.pipe, self.network = pipe, network
        self.guided = config["guidance_scale"] > 1
        parts = {"decoder": pipe.vae.decoder, "controlnet": getattr(pipe, "controlnet", None)}
        parts |= {name: m for name, m in pipe.components.items() if name.startswith("text_encoder")}
        self.parts = {name: module for name, module in parts.items() if module is not None}
        self.latents: Tensor | None = None
        self.accepted = inspect.signature(pipe.__call__).parameters
        self.extra = dict(config.get("call") or {})
        self.options = {"guidance_scale": config["guidance_scale"], **self.extra}
        for key in ("height", "width"):
            if config.get(key):
                self.options[key] = config[key]
        self.negative_prompt = config.get("negative_prompt")
        for key in [*self.options, *(["negative_prompt"] if self.negative_prompt else [])]:
            if key not in self.accepted:
                raise UserError(f"model.{key}: {type(pipe).__name__} takes no such option")
        self.strength, self.control_map = config.get("strength"), None
        if control is not None:
            self._follow(control)

    def _follow(self, control: Control) -> None:
        """Let the pipeline follow `control` and, with a strength, begin with its photograph."""
        followed, photo = control.at(self.size())
        name = "control_image" if "control_image" in self.accepted else "image"
        self.options[name] = followed[None].float() / 255
        if photo is not None:
            self.control_map = followed
        if self.strength is not None:
            self.options |= {"image": photo[None].float() / 255, "strength": self.strength}
            self.parts["encoder"] = self.pipe.vae.encoder

    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        side = self.network.config.sample_size
        if not isinstance(side, int):  # Flux has its size in the pipeline
            side = getattr(self.pipe, "default_sample_size", 128)
        default = side * self.pipe.vae_scale_factor
        return self.options.get("height", default), self.options.get("width", default)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """A line for each text encoder that cuts prompts off."""
        lines = []
        for name, tokenizer in self.pipe.components.items():
            if not name.startswith("tokenizer") or tokenizer is None:
                continue
            limit = tokenizer.model_max_length
            if type(tokenizer).__name__.startswith("T5"):
                asked = self.options.get("max_sequence_length")
                limit = asked or self.accepted["max_sequence_length"].default
            lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
            if long := sum(length > limit for length in lengths):
                lines.append(
                    f"{long} of {len(lengths)} prompts are cut at the {limit} tokens of {name}; "
                    f"the longest has {max(lengths)}"
                )
        return lines

    def __call__(
        self,
        scheduler: SchedulerMixin,
        steps: int,
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
        decode: bool = True,
        **step_options: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], one for each seed and prompt."""
        options = {**self.options, **self._step_options(scheduler, step_options)}
        if self.negative_prompt:
            options["negative_prompt"] = [self.negative_prompt] * len(prompts)
        self.pipe.scheduler = scheduler
        first = count_skipped(steps, self.strength) * scheduler.order
        finite = loading.finite_outputs(self.network, scheduler, first)
        try:
            with finite, _last_step(scheduler) as last:
                images = self.pipe(
                    prompt=list(prompts),
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="pt" if decode else "latent",
                    **options,
                ).images
        except (AttributeError, TypeError, ValueError) as error:
            if not self.extra or isinstance(error, UserError):
                raise
            # diffusers itself may fail with such an option, as with clip_skip under transformers 5.
            given = ", ".join(f"{key}={value}" for key, value in self.extra.items())
            reason = first_line(error)
            raise UserError(
                f"model.call: {type(self.pipe).__name__} fails with {given} ({reason})"
            ) from error
        self.latents = last.pop()
        return 2 * images.float() - 1 if decode else self.latents

    def _step_options(self, scheduler: SchedulerMixin, options: dict) -> dict[str, Any]:
        passed = {}
        for key, value in options.items():
            if key in self.accepted:
                passed[key] = value
            elif value != inspect.signature(scheduler.step).parameters[key].default:
                raise UserError(
                    f"solver.step.{key}={value}: {type(self.pipe).__name__} does not pass it on"
                )
        return passed


def count_skipped(steps: int, strength: float | None) -> int:
    """How many of `steps` img2img leaves out, by the rule of diffusers' `get_timesteps`.

    With `strength` in (0, 1), the first step that is made begins with the noised photograph.
    """
    return 0 if strength is None else max(steps - int(steps * strength), 0)


@contextmanager
def _last_step(scheduler: SchedulerMixin) -> Iterator[list[Tensor]]:
    """A list that holds the result of the scheduler's last step; not all pipelines return it."""
    last, step = [], scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, **options: Any) -> Any:
        output = step(*args, **options)
        last[:] = [output[0] if isinstance(output, tuple) else output.prev_sample]
        return output

    scheduler.step = watched
    try:
        yield last
    finally:
        del scheduler.step


def find_text_model(config: Mapping[str, Any]) -> TextModel:
    """The pipeline in the folder `path`, or in `hub_id` at `revision`, with its `controlnet`.

    With `strength`, a share of the steps in (0, 1], it is img2img from `control_photo`.
    UserError if there is no pipeline, or if an option is out of its range.
    """
    _check(config)
    key = loading.describe_key(config)
    root = loading.find_folder(
        config,
        download=DiffusionPipeline.download,
        variant=config.get("variant"),
        use_safetensors=config.get("use_safetensors", True) or None,
        trust_remote_code=False,
        **dict.fromkeys(LEFT_OUT),  # parts that are given are not fetched
    )
    index = _read_index(root, key)
    name, settings, controlnet, control = index["_class_name"], {}, None, None
    if config.get("controlnet"):
        control_key = loading.describe_key(config["controlnet"], "model.controlnet")
        folder = loading.find_folder(config["controlnet"], "model.controlnet")
        _control_class(folder, control_key)
        controlnet = loading.find_weights(
            folder, control_key, config["controlnet"], "model.controlnet"
        )
        control = find_control(config)
        settings |= {"controlnet": controlnet.sha256, **control.settings}
        kind = "ControlNetPipeline"
        if (strength := config.get("strength")) is not None:
            kind, settings["strength"] = "ControlNetImg2ImgPipeline", strength
        name = name.replace("Pipeline", kind)
    pipeline = getattr(diffusers, name, None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, DiffusionPipeline)):
        raise UserError(f"{key}: a {name}, which diffusers does not have")
    missing = [part for part in ("vae",) if part not in index]
    if "prompt" not in inspect.signature(pipeline.__call__).parameters or missing:
        raise UserError(f"{key}: a {name}; expected a pipeline from text to images")
    scheduler, schedule = loading.read_scheduler(root, key, config)
    options = ("guidance_scale", "negative_prompt", "height", "width", "call", "variant")
    networks = {part: _find_part(root, part, key, config) for part in _networks(root)}
    settings |= {
        "networks": {part: weights.sha256 for part, weights in networks.items()},
        "tokenizers": _tokenizers_hash(root, index, key),
        "scheduler": schedule,
        **{option: config.get(option) for option in options},
    }
    parts = (pipeline, networks, controlnet, control)
    return TextModel(config["name"], settings, scheduler, config, root, *parts)


def _check(config: Mapping[str, Any]) -> None:
    scale = config["guidance_scale"]
    real = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not real or not math.isfinite(scale) or scale < 0:
        raise UserError(f"model.guidance_scale={scale}: expected a number of at least 0")
    for key in ("height", "width"):
        value = config.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value > 0 and value % 8 == 0):
            raise UserError(f"model.{key}={value}: expected a multiple of 8 pixels")
    negative = config.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"model.negative_prompt={negative}: expected text, one for all images")
    for key in ("control_photo", "strength"):
        if config.get(key) is not None and not config.get("controlnet"):
            raise UserError(
                f"model.{key}={config[key]}: {config['name']} has no ControlNet; "
                "use model=sd15_canny, sd15_depth or sd15_pose"
            )
    for key in ("cpu_offload", "slicing", "use_safetensors"):
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"model.{key}={config[key]}: expected true or false")


def _read_index(root: Path, key: str) -> dict[str, Any]:
    try:
        index = read_object(root / "model_index.json", PipelineIndex)
    except FileNotFoundError:
        raise UserError(f"{key}: no pipeline in it (model_index.json)") from None
    except UserError as error:
        raise UserError(f"{key}: {error}; it describes no pipeline") from None
    for part, value in index.items():
        if isinstance(value, list) and value != [None, None] and part not in LEFT_OUT:
            _check_class(value, f"{key}: its {part}")
    return index


def _check_class(value: list, label: str) -> None:
    """UserError unless [library, class] is a class of `LIBRARIES` that runs no code of the model.

    An Auto class reads its class from the model's config, which may name a file of the model.
    """
    library, name = value if len(value) == 2 else (None, None)
    if library not in LIBRARIES or not isinstance(name, str):
        libraries = ", ".join(LIBRARIES)
        raise UserError(f"{label} is of {value!a:.200}; expected a class of {libraries}")
    if re.match("Auto[A-Z]", name):
        raise UserError(f"{label} is an {name}, which may run the model's own code; name its class")


def _networks(root: Path) -> dict[str, tuple[str, str]]:
    """(library, class) of each part of a pipeline that has weights and is used."""
    index = read_object(root / "model_index.json", PipelineIndex)
    return {
        name: tuple(value)
        for name, value in index.items()
        if isinstance(value, list)
        and value[0] in ("diffusers", "transformers")
        and name not in LEFT_OUT
        and "Tokenizer" not in value[1]
        and "Scheduler" not in value[1]
    }


def _denoiser(root: Path) -> str:
    return "unet" if "unet" in _networks(root) else "transformer"


def _be_quiet(name: str) -> None:
    """No bars while loading, and no warning for prompts cut in every batch: `cut` says it once."""
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError:
        raise UserError(f"model={name}: needs transformers: {INSTALL}") from None

    for module in (logging, transformers_logging):
        module.disable_progress_bar()
        module.set_verbosity_error()


def _is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _tokenizer_reason(root: Path, error: Exception) -> str | None:
    """Why a tokenizer that is only a SentencePiece model cannot be read; None if it can.

    transformers takes an unreadable file for one of tiktoken; `error` is then misleading.
    """
    for file in sorted(root.glob("tokenizer*/*.model")):
        if (file.parent / "tokenizer.json").exists():
            continue
        missing = [name for name, module in SENTENCEPIECE.items() if not _is_installed(module)]
        if missing:
            return f"its {file.parent.name} needs {' and '.join(missing)}: {INSTALL}"
        if "tiktoken" in str(error):
            return f"{file.parent.name}/{file.name} cannot be read"
    return None


def _left_out(pipeline: type[DiffusionPipeline]) -> dict[str, Any]:
    taken = inspect.signature(pipeline.__init__).parameters
    left = {name: None for name in LEFT_OUT if name in taken}
    # SDXL puts a watermark on its images if the package for it happens to be installed
    off = ("requires_safety_checker", "add_watermarker")
    return left | {name: False for name in off if name in taken}


def _class(library: str, name: str, label: str) -> type:
    try:
        cls = getattr(importlib.import_module(library), name)
    except ImportError:
        raise UserError(f"{label} needs {library}: {INSTALL}") from None
    except AttributeError:
        raise UserError(f"{label} is a {name}, unknown to {library}") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"{label} is a {name}, which is no network")
    return cls


def _find_part(root: Path, name: str, key: str, config: Mapping[str, Any]) -> loading.Weights:
    if not (root / name).is_dir():
        raise UserError(f"{key}: no {name} in it")
    return loading.find_weights(root / name, key, config)


def _tokenizers_hash(root: Path, index: Mapping[str, Any], key: str) -> str:
    digest = hashlib.sha256()
    for part, value in index.items():
        if not isinstance(value, list) or "Tokenizer" not in str(value[1]):
            continue
        if not (root / part).is_dir():
            raise UserError(f"{key}: no {part} in it")
        for file in sorted(file for file in (root / part).iterdir() if file.is_file()):
            digest.update(file.name.encode() + read_bytes(file))
    return digest.hexdigest()


def _control_class(folder: Path, key: str) -> type:
    names = ("ControlNetModel", "SD3ControlNetModel", "FluxControlNetModel")
    return getattr(diffusers, loading.read_config(folder, key, names)["_class_name"])
