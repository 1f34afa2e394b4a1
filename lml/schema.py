"""What every config, and every file that the project reads, may hold: types, ranges, and why.

A schema is a dataclass. The type hint of a field says which values are allowed. A field with a
default may be missing. Keys that a schema doesn't name are not checked here, but where they are
used.

`check` checks a config before anything is made of it, `lml.files.read_object` checks a file, and
`check_call` checks the arguments of a `_target_` against its signature.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from lml.errors import UserError

SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Range:
    """Numbers from `low` (itself not, if `above`) to `high`; `why` says why no higher."""

    low: float = -math.inf
    high: float = math.inf
    why: str = ""
    above: bool = False


@dataclass(frozen=True)
class Form:
    """Text that `expression` matches as a whole; messages call it `called`."""

    expression: str
    called: str


# --- types -------------------------------------------------------------------------------------

Whole = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
# manifest.json names every image of a run
Images = Annotated[int, Range(1, 10**7, "a run's files are listed and hashed one by one")]
Batch = Annotated[int, Range(1, 10**7, "no more images than a run can have")]
Threads = Annotated[int, Range(1, 1024, "the system starts no more, and the process ends")]
Pixels = Annotated[int, Range(1, 2**14, "a larger image's noise alone fills the memory")]
Seed = Annotated[int, Range(0, 2**62, "seeds are numbers of 64 bits, and image i has seed + i")]
Evaluations = Annotated[int, Range(1, 10**6, "no noise schedule has so many timesteps")]
# With one evaluation, LML has no anchor.
SeveralEvaluations = Annotated[int, Range(2, 10**6, "no noise schedule has so many timesteps")]
Samples = Annotated[int, Range(1, 10**5, "they are held in memory")]
Steps = Annotated[int, Range(1, 10**12, "no training takes so long")]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
Text = Annotated[str, Form(r"[^\x00-\x1f\x7f\ud800-\udfff]+", "text on one line")]
# A folder under outputs/; the name cannot lead out of it.
Name = Annotated[
    str,
    Form(r"(?!/|(.*/)?\.\.?(/|$))[^\x00-\x1f\x7f\ud800-\udfff\\]{1,200}", "a folder's name"),
]
# lml.files.check_path checks the rest.
FilePath = Annotated[str, Form(r"[^\x00\ud800-\udfff]+", "a path")]
Target = Annotated[
    str, Form(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", "the dotted name of a class or function")
]
Sha256 = Annotated[str, Form("[0-9a-f]{64}", "64 hexadecimal digits")]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Attention = Literal["math", "flash", "efficient", "cudnn"]
CalibrationObjective = Literal["rmse", "features", "dinov2", "inception", "lpips"]


@dataclass
class Made:
    """A group with a `_target_`; `check_call` checks its arguments."""

    _target_: Target


@dataclass
class Nothing:
    """An empty group."""


@dataclass
class Schedule(Made):
    """A noise schedule."""

    num_train_timesteps: Evaluations = 1000


@dataclass
class Exact(Made):
    """A model whose score is known in closed form."""

    sample_size: Annotated[int, Range(1, 128, "its covariance has (3 * size^2)^2 entries")] = 16
    in_channels: Annotated[int, Range(1, 64, "its covariance grows with the square")] = 3
    seed: Seed = 0
    components: Annotated[int, Range(1, 10**4, "each is held in memory")] = 1
    rank: Annotated[int, Range(1, 10**4, "each factor is held in memory")] = 1
    block_size: Count = 1


# --- configs -----------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a network's files are."""

    path: FilePath | None = None
    hub_id: Text | None = None
    revision: Text | None = None
    variant: Text | None = None
    use_safetensors: bool = True


@dataclass
class ControlMap(Place):
    """What is made of the photograph that a ControlNet follows, and its network's files."""

    _: dataclasses.KW_ONLY
    kind: Literal["canny", "depth", "pose"]


@dataclass
class Model(Place):
    """A model of any kind; lml.pipelines checks what each kind needs."""

    _: dataclasses.KW_ONLY
    name: Text
    kind: Literal["pixel", "latent", "text"] = "pixel"
    network: Exact | None = None
    scheduler: Schedule | None = None
    patch: Annotated[int, Range(1, 256, "no image is a multiple of so many pixels")] = 1
    sample_size: Pixels | None = None
    scaling_factor: Positive | None = None
    guidance_scale: NotNegative = 0.0
    negative_prompt: str | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    call: dict[str, Any] | None = None
    cpu_offload: bool = False
    slicing: bool = False
    controlnet: Place | None = None
    control_image: FilePath | None = None
    control_photo: FilePath | None = None
    control_map: ControlMap | None = None
    strength: Annotated[float, Range(0, 1, above=True)] | None = None
    published_damping: dict[str, Positive] | None = None  # by evaluations, and "else"
    aligned_timesteps: list[Count] | None = None


@dataclass
class Solver:
    """A solver. Its options are those of its class; `check_call` checks them."""

    name: Text
    scheduler: Made
    title: Text | None = None  # what people call it, with {options} of its scheduler
    step: dict[str, Any] | None = None
    published_target: Text | None = None
    published_damping: Positive | None = None  # whatever the model


@dataclass
class Grid:
    """A grid of timesteps. Its other keys are options of the solver."""

    name: Text | None = None
    of_model: bool = False
    aligned_timesteps: list[Count] | None = None


@dataclass
class LML:
    """LML's options. lml.options checks those that depend on one another."""

    rank: Whole
    damping: Positive | list[Positive | None] | None = None
    damping_scale: Literal["relative", "absolute"] = "relative"
    anchor: Literal["history", "ema"] = "history"
    kappa: Share = 0.0
    target: Literal["prediction", "increment", "direction"] = "prediction"
    norm_preserving: bool = True
    freeze: Share = 0.0
    length: Positive | list[Positive] = 1.0
    calibration: FilePath | None = None  # only lml=calibrated has this key and the next two
    objective: CalibrationObjective = "rmse"
    timesteps: bool = False


@dataclass
class Logger:
    """A logger. All keys but the name are wandb's."""

    name: Literal["none", "wandb"]
    project: Text | None = None
    entity: Text | None = None
    mode: Text = "auto"  # wandb checks it
    group: Text | None = None
    tags: list[Text] | None = None


@dataclass
class Search:
    """What a sweep searches for."""

    objective: Text | None
    num_images: Images | None
    final_seed: Seed


@dataclass
class Searching:
    """The part of sample.yaml that a sweep needs before it has a cell."""

    metrics: dict[str, Made]
    sweep: Search | None = None


@dataclass
class Sampling:
    """What scripts that sample share: with what, how, and where the results go."""

    _: dataclasses.KW_ONLY
    seed: Seed
    batch_size: Batch
    device: Text
    dtype: Dtype
    compile: bool
    channels_last: bool
    attention: Attention | None
    threads: Threads | None
    run_dir: FilePath | None
    overwrite: bool
    progress: bool
    prompts: Made | Nothing
    model: Model
    solver: Solver
    grid: Grid
    lml: LML


@dataclass
class Sample(Searching, Sampling):
    """configs/sample.yaml"""

    _: dataclasses.KW_ONLY
    name: Name
    num_images: Images
    seeds: Images | None = None
    rate: Positive | None = None
    nfe: Evaluations
    reference: FilePath | None
    logger: Logger
    show: list[Text] | Text | None = None


@dataclass
class FineSolution:
    """The solution that a calibration aims at."""

    solver: Text | None
    nfe: SeveralEvaluations | None


@dataclass
class Calibrate(Sampling):
    """configs/calibrate.yaml"""

    nfe: SeveralEvaluations
    objective: CalibrationObjective
    timesteps: bool
    searched: Samples
    unseen: Samples
    ranks: list[Annotated[int, Range(1, 64, "so many directions are held in memory")]]
    numbers: list[Literal["damping", "length"]]
    rounds: Annotated[int, Range(1, 10**6)]
    fine: FineSolution
    extractor: Made | None


@dataclass
class Evaluate:
    """configs/evaluate.yaml"""

    run_dir: FilePath | None
    images: FilePath | None
    reference: FilePath | None
    out: FilePath | None
    batch_size: Batch
    device: Text
    threads: Threads | None
    metrics: dict[str, Made]
    prompts: Made | Nothing


@dataclass
class Tabulate:
    """configs/tabulate.yaml. It also has the keys of configs/sample.yaml, which are not used."""

    name: Name
    runs: FilePath | None
    out: FilePath | None
    show: list[Text] | Text | None
    evaluations: FilePath | None


@dataclass
class Compare:
    """configs/compare.yaml"""

    run_dirs: list[FilePath]
    out: FilePath
    show: list[Text] | Text | None
    evaluations: FilePath | None


@dataclass
class Export:
    """configs/export.yaml"""

    layout: Made
    run_dir: FilePath | None
    out: FilePath
    prompts: Made | Nothing


@dataclass
class Budget:
    """How much and how to train. `images` is the total, however often training is interrupted."""

    images: Steps = 3_000_000
    batch_size: Batch = 128
    lr: Positive = 4e-4
    weight_decay: NotNegative = 0.0
    warmup: Annotated[int, Range(1, 10**9)] = 500  # steps
    decay_from: Share = 0.6  # after this share of the images the rate falls linearly to 0
    ema_inv_gamma: Positive = 8.0  # the average covers about the last eighth of the steps
    compile: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one on this machine
    save_minutes: NotNegative = 5.0
    report_every: Count = 10  # checkpoints; slow measurements are made then, and at the end
    seed: Seed = 0


@dataclass
class Data:
    """Where CIFAR-10 is."""

    path: FilePath | None
    download: bool


@dataclass
class Train:
    """configs/train.yaml"""

    task: Literal["denoiser", "features"]
    run_dir: FilePath
    device: Text
    threads: Threads | None
    data: Data
    budget: Budget


@dataclass
class Timesteps:
    """How training draws its timesteps."""

    uniform: Share
    log_sigma_mean: Annotated[float, Range(-100, 100)]
    log_sigma_std: Annotated[float, Range(1e-3, 100)]


Width = Annotated[int, Range(1, 2**13, "a layer has its square of weights")]


@dataclass
class UNet(Made):
    """The denoiser's network."""

    sample_size: Annotated[int, Range(1, 32, "CIFAR-10's images have 32 pixels")]
    in_channels: Width
    out_channels: Width
    layers_per_block: Annotated[int, Range(1, 64, "each is held in memory")]
    block_out_channels: list[Width]
    attention_head_dim: Width | None = None
    norm_num_groups: Width = 32


@dataclass
class TrainingSchedule(Made):
    """The noise schedule to train with. Training reports on images made with 20 evaluations."""

    num_train_timesteps: Annotated[int, Range(20, 10**6, "no training sees so many")] = 1000


@dataclass
class TrainDenoiser(Train):
    """configs/train/denoiser.yaml"""

    unet: UNet
    scheduler: TrainingSchedule
    timesteps: Timesteps
    report_images: Annotated[int, Range(2, 10**6, "they are held in memory")]
    fd_cifar: Made


@dataclass
class FeatureNetwork(Made):
    """The classifier behind FD-CIFAR."""

    width: Width = 64
    num_features: Width = 256


@dataclass
class TrainFeatures(Train):
    """configs/train/features.yaml"""

    network: FeatureNetwork


@dataclass
class Benchmark:
    """configs/benchmark.yaml"""

    parts: list[Literal["correction", "memory", "run", "outside", "fd", "pipelines", "evaluators"]]
    threads: Threads | None
    out: FilePath | None
    shape: list[Annotated[int, Range(1, 2**20, "tensors of it are held in memory")]]
    ranks: list[Annotated[int, Range(1, 64, "so many tensors are held in memory")]]
    repeats: Annotated[int, Range(1, 10**6)]
    settings: list[Literal["float32", "bfloat16", "compiled"]]
    nfe: Evaluations
    batch_size: Batch
    batches: Annotated[int, Range(1, 10**6)]
    fd_images: Images
    evaluator_images: Images
    evaluator_turns: Annotated[int, Range(1, 10**6)]
    model: Model


def of_script(name: str, config: Mapping[str, Any]) -> type:
    """The schema of configs/`name`.yaml. For training, it depends on the task in `config`."""
    if name == "train":
        tasks = {"denoiser": TrainDenoiser, "features": TrainFeatures}
        task = config.get("task")
        return tasks.get(task, Train) if isinstance(task, str) else Train
    scripts = {
        "sample": Sample,
        "calibrate": Calibrate,
        "evaluate": Evaluate,
        "tabulate": Tabulate,
        "compare": Compare,
        "export": Export,
        "benchmark": Benchmark,
    }
    return scripts[name]


# --- files -------------------------------------------------------------------------------------


@dataclass
class RunConfig:
    """config.yaml of a run, as far as tables need it."""

    settings: dict[str, Any]
    num_images: Images
    seed: Whole
    nfe: Count
    dtype: Dtype
    model: Model
    solver: Solver
    grid: Grid
    lml: LML


@dataclass
class WholeRunConfig(RunConfig):
    """config.yaml of a run, with all that is needed to make it again."""

    name: str
    batch_size: Count
    compile: bool
    channels_last: bool
    attention: Attention | None
    prompts: Made | Nothing
    seeds: Images | None = None


@dataclass
class Manifest:
    """manifest.json of a run."""

    complete: bool
    count: Whole
    num_images: Count
    settings_sha256: Sha256
    config_sha256: Sha256
    images: dict[str, Sha256]


@dataclass
class Seconds:
    """The seconds of a run, by part of the work."""

    network: NotNegative
    correction: NotNegative
    solver: float


@dataclass
class Timing:
    """timing.json of a run."""

    images: Count
    images_per_second: NotNegative
    evaluations_per_image: Count
    seconds: Seconds
    processes: Count
    threads: Count
    device: str
    seal: Any = None  # lml.seals.why_not_sealed checks it


@dataclass
class Score:
    """The entry of one metric in metrics.json."""

    value: float | dict[str, float | None]
    protocol: dict[str, Any]
    warning: str = ""
    seconds: float = 0.0
    steps: dict[str, list[float | None]] | None = None
    config_sha256: Sha256 | None = None
    seal: Any = None  # lml.seals.why_not_sealed checks it


@dataclass(frozen=True)
class Cell:
    """A run of a sweep, in sweep.yaml."""

    overrides: list[str]
    run: str | None  # name of its folder
    solver: str
    grid: str
    lml: dict[str, Any]
    nfe: Count
    seed: Whole
    num_images: Count
    model: str
    dtype: Dtype
    status: Literal["done", "missing", "failed", "refused"]
    reason: str | None


@dataclass
class SweepFile:
    """sweep.yaml of a study."""

    commands: list[str]
    cells: list[Cell]


@dataclass
class CompBenchExport:
    """run.json beside the samples of a category that were laid out for T2I-CompBench."""

    category: Text
    settings_sha256: Sha256
    images_sha256: Sha256


@dataclass
class CompBenchScore:
    """The score of one image, in the JSON of T2I-CompBench's evaluators."""

    question_id: Whole
    answer: float | str


@dataclass
class Error:
    """The error of one choice of a calibration, on samples that the search did not see."""

    unseen: float


@dataclass
class Errors:
    """The errors of a calibration's choices."""

    off: Error
    default: Error
    calibrated: Error
    timesteps: Error | None = None


@dataclass
class Choice:
    """A damping and a length for each step; see lml.calibration.search."""

    rank: Whole
    damping: list[Positive | None] | None
    length: list[Positive] | None = None
    timesteps: list[Count] | None = None


@dataclass
class SearchedGrid:
    """The options of a grid whose timesteps were searched."""

    aligned_timesteps: list[Count]
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False


@dataclass
class CalibrationFile:
    """calibration.json"""

    settings: dict[str, Any]
    lml: LML
    chosen: Literal["off", "default", "timesteps", "calibrated"]
    calibrated: Choice
    errors: Errors
    grid: SearchedGrid | None = None
    seal: Any = None


@dataclass
class SearchedValues:
    """Values of a search, those that are known."""

    damping: list[NotNegative] | None = None
    length: list[Positive] | None = None
    timesteps: list[Positive] | None = None


@dataclass
class SearchState:
    """The state of one search; see lml.calibration.search."""

    rank: Whole
    values: SearchedValues
    searched: list[Literal["damping", "length", "timesteps"]]
    error: NotNegative
    mu: Positive
    rounds: Whole
    is_done: bool


@dataclass
class CalibrationState:
    """state.json of a calibration that was interrupted."""

    of: dict[str, Any]
    searches: dict[str, SearchState]
    seal: Any = None


@dataclass
class Extractor:
    """The network that made features: its name, and the hash of its weights."""

    name: str = ""
    sha256: str = ""


@dataclass
class Statistics:
    """The protocol in a file of reference statistics."""

    extractor: Extractor | None = None


@dataclass
class PipelineIndex:
    """model_index.json of a pipeline in diffusers' format."""

    _class_name: Annotated[str, Form(r"[A-Za-z_]\w*Pipeline", "the class of a pipeline")]


@dataclass
class PartConfig:
    """config.json of a network, or scheduler_config.json."""

    _class_name: Annotated[str, Form(r"[A-Za-z_]\w*", "the name of a class")]
    num_train_timesteps: Evaluations | None = None


Layers = Annotated[int, Range(0, 1000, "each is held in memory")]


@dataclass
class Network:
    """config.json of a network, in any format: the keys whose values could fill the memory."""

    layers_per_block: Layers | list[Layers | list[Layers]] | None = None
    transformer_layers_per_block: Layers | list[Layers | list[Layers]] | None = None
    num_layers: Layers | None = None
    num_single_layers: Layers | None = None
    num_hidden_layers: Layers | None = None
    num_decoder_layers: Layers | None = None


# --- checking ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A value that does not fit: its key, the value, and in words what was expected."""

    key: str
    value: Any
    asked: str

    def __str__(self) -> str:
        if self.value is dataclasses.MISSING:
            return f"{self.key}: missing; expected {self.asked}"
        return f"{self.key}={shown(self.value)}: expected {self.asked}"


def shown(value: Any) -> str:
    """`value` as a part of one line."""
    text = "null" if value is None else str(value)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check(config: Any, schema: Any, key: str = "") -> None:
    """UserError, naming the key, unless `config` fits the hint `schema`. `config` is at `key`."""
    if problem := find_problem(schema, config, key):
        raise UserError(str(problem))


def check_whole(value: Any, key: str, least: int = 1) -> None:
    """UserError, naming the key, unless `value` is a whole number of at least `least`."""
    check(value, Annotated[int, Range(least)], key)


def check_call(
    function: Callable, arguments: Mapping[str, Any], key: str, lenient: bool = False
) -> None:
    """UserError, naming the key, unless the arguments at `key` fit the signature of `function`.

    Groups with a `_target_` are not checked here, nor names that begin with "_", which are Hydra's.
    With `lenient`, None always fits: files of older versions contain it.
    """
    hints = _hints(function)
    for name, value in arguments.items():
        hint = hints.get(str(name), Any)
        if lenient and value is None:
            continue
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{key}.{name}=nan: expected a number")
        if name.startswith("_") or (isinstance(value, Mapping) and "_target_" in value):
            continue
        if problem := find_problem(hint, value, f"{key}.{name}"):
            raise UserError(str(problem))


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    """The hint of each argument. None fits, too, if it is the default."""
    bodies = [function]
    if inspect.isclass(function):  # its bases may take some of the arguments
        bodies = [base.__init__ for base in reversed(function.__mro__) if "__init__" in vars(base)]
    try:
        parameters, hints = inspect.signature(function).parameters, {}
        for body in bodies:
            hints |= typing.get_type_hints(inspect.unwrap(body), include_extras=True)
    except (TypeError, ValueError, NameError, AttributeError):  # written in C, or no hints
        return {}
    return {
        name: _loose(hints[name] if parameter.default is not None else hints[name] | None)
        for name, parameter in parameters.items()
        if name in hints and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _loose(hint: Any) -> Any:
    """`hint` with types in place of listed values: the lists of other libraries are incomplete."""
    if typing.get_origin(hint) is Literal:
        return Union[tuple(type(each) for each in typing.get_args(hint))]  # noqa: UP007
    if typing.get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(_loose, typing.get_args(hint)))]  # noqa: UP007
    return hint


@functools.cache
def _fields(schema: type) -> dict[str, tuple[Any, bool]]:
    """For each key of a schema: its hint, and whether it may be missing."""
    hints = typing.get_type_hints(schema, include_extras=True)
    missing = dataclasses.MISSING
    return {
        field.name: (
            hints[field.name],
            field.default is not missing or field.default_factory is not missing,
        )
        for field in dataclasses.fields(schema)
    }


def find_problem(hint: Any, value: Any, key: str) -> Problem | None:
    """The first problem of `value`, which is at `key`, with `hint`; None if it fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return None
    if origin in (Union, types.UnionType):
        problems = [find_problem(each, value, key) for each in arguments]
        if None in problems:
            return None
        # a problem inside the value says more, if it is clear which alternative was meant
        inside = [problem for problem in problems if problem.key != key]
        return inside[0] if len(inside) == 1 else Problem(key, value, ask(hint, value))
    if origin is Annotated:
        problem = find_problem(arguments[0], value, key)
        if problem is None and all(_obeys(value, rule) for rule in arguments[1:]):
            return None
        return Problem(key, value, ask(hint, value))
    if dataclasses.is_dataclass(hint):
        return _find_in_schema(hint, value, key)
    if origin is Literal:
        # True is 1 to Python
        fits = any(value == each and type(value) is type(each) for each in arguments)
    elif (kind := origin or hint) in (int, float):
        fits = isinstance(value, (int, float) if kind is float else int)
        fits = fits and not isinstance(value, bool)
    elif kind in (str, bool, type(None)):
        fits = isinstance(value, kind)
    elif inspect.isclass(kind) and issubclass(kind, Mapping):
        if isinstance(value, Mapping):
            items = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
            return _first(arguments[1] if arguments else Any, items)
        fits = False
    elif kind in (list, tuple, Sequence, typing.Sequence):
        if isinstance(value, (list, tuple)):
            items = [(f"{key}[{number}]", item) for number, item in enumerate(value)]
            kinds = tuple(each for each in arguments if each is not Ellipsis)
            return _first(Union[kinds] if kinds else Any, items)  # noqa: UP007
        fits = False
    else:  # a hint that cannot be checked, or a class whose objects no config holds
        plain = isinstance(value, (str, int, float, list, dict))
        fits = not (inspect.isclass(kind) and plain and _is_foreign(kind))
    return None if fits else Problem(key, value, ask(hint, value))


def _is_foreign(kind: type) -> bool:
    """Whether no text, number or list is an object of the class."""
    return not issubclass(kind, (str, int, float, list)) and not hasattr(kind, "__fspath__")


def _first(hint: Any, items: list[tuple[str, Any]]) -> Problem | None:
    for key, item in items:
        if problem := find_problem(hint, item, key):
            return problem
    return None


def _find_in_schema(schema: type, value: Any, key: str) -> Problem | None:
    if not isinstance(value, Mapping) or (schema is Nothing and value):
        return Problem(key, value, ask(schema, value))
    for name, (hint, optional) in _fields(schema).items():
        inner = f"{key}.{name}" if key else name
        if name in value:
            if problem := find_problem(hint, value[name], inner):
                return problem
        elif not optional:
            return Problem(inner, dataclasses.MISSING, ask(hint, None))
    return None


def _obeys(value: Any, rule: Range | Form) -> bool:
    if isinstance(rule, Form):
        return re.fullmatch(rule.expression, value) is not None
    within = rule.low < value if rule.above else rule.low <= value
    return within and value <= rule.high and abs(value) < math.inf


def ask(hint: Any, value: Any) -> str:
    """What `hint` expects in place of `value`, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        # null first: "null or a number"
        arguments = sorted(arguments, key=lambda each: each is not type(None))
        return " or ".join(dict.fromkeys(ask(each, value) for each in arguments))
    if origin is Annotated:
        return _ask_rule(ask(arguments[0], value), arguments[1], value)
    if origin is Literal:
        words = [str(each) for each in arguments]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if inspect.isclass(hint) and issubclass(hint, Made):
        return "a group with a _target_"
    if hint is Nothing:
        return "an empty group"
    kind = origin or hint
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if kind in words:
        return words[kind]
    if dataclasses.is_dataclass(kind) or (inspect.isclass(kind) and issubclass(kind, Mapping)):
        return "a group of keys"
    if kind in (list, tuple, Sequence, typing.Sequence):
        return f"a list (each {ask(arguments[0], value)})" if arguments else "a list"
    return "a path" if hasattr(kind, "__fspath__") else f"a {getattr(kind, '__name__', kind)}"


def _ask_rule(kind: str, rule: Range | Form, value: Any) -> str:
    if isinstance(rule, Form):
        return rule.called
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and value > rule.high:
        why = f" ({rule.why})" if rule.why else ""
        return f"{kind} from {rule.low:.15g} to {rule.high:.15g}{why}"
    if rule.above:
        return f"{kind} > {rule.low:g}"
    if rule.high <= 1:
        return f"{kind} in [{rule.low:g}, {rule.high:g}]"
    return f"{kind} of at least {rule.low:g}"
