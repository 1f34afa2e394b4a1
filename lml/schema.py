"""What every config, and every file that the project reads, may hold: types, ranges, and why.

A schema is a dataclass. A field's type hint says what is taken, its default that it may be missing.
Keys that a schema doesn't name are let through: whoever uses them says what it thinks of them.

`check` holds a config against its schema before anything is made of it, lml.files.read_object a
file, and `check_call` the arguments of whatever a `_target_` names against its signature.
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
    """Numbers from `low` (or above it) to `high`, and why no higher."""

    low: float = -math.inf
    high: float = math.inf
    why: str = ""
    above: bool = False


@dataclass(frozen=True)
class Form:
    """Text that the expression matches whole, and how it is called."""

    expression: str
    called: str


# --- types -------------------------------------------------------------------------------------

Whole = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
# manifest.json names every image of a run
Images = Annotated[int, Range(1, 10**7, "a run's files are listed and hashed one by one")]
Batch = Annotated[int, Range(1, 10**7, "no more images than a run can have")]
Threads = Annotated[int, Range(1, 1024, "of more the system starts none, and the process ends")]
Pixels = Annotated[int, Range(1, 2**14, "a larger image's noise alone fills the memory")]
Seed = Annotated[int, Range(0, 2**62, "seeds are numbers of 64 bits, and image i has seed + i")]
Evaluations = Annotated[int, Range(1, 10**6, "no noise schedule has as many timesteps")]
# Of one evaluation LML has no anchor.
SeveralEvaluations = Annotated[int, Range(2, 10**6, "no noise schedule has as many timesteps")]
Samples = Annotated[int, Range(1, 10**5, "they are held in memory")]
Steps = Annotated[int, Range(1, 10**12, "no training takes as long")]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
Text = Annotated[str, Form(r"[^\x00-\x1f\x7f\ud800-\udfff]+", "text on one line")]
# Of a folder under outputs/, which it does not lead out of.
Name = Annotated[
    str,
    Form(r"(?!/|(.*/)?\.\.?(/|$))[^\x00-\x1f\x7f\ud800-\udfff\\]{1,200}", "a folder's name"),
]
# lml.files.check_path says more.
FilePath = Annotated[str, Form(r"[^\x00\ud800-\udfff]+", "a path")]
Target = Annotated[
    str, Form(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", "the dotted name of a class or function")
]
Sha256 = Annotated[str, Form("[0-9a-f]{64}", "64 hexadecimal digits")]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Attention = Literal["math", "flash", "efficient", "cudnn"]
CalibrationObjective = Literal["rmse", "features"]


@dataclass
class Made:
    """What a `_target_` makes; `check_call` knows the rest."""

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
    """A model whose score is known."""

    sample_size: Annotated[int, Range(1, 128, "its covariance has (3 * size^2)^2 entries")] = 16
    in_channels: Annotated[int, Range(1, 64, "its covariance is as many times larger")] = 3
    seed: Seed = 0
    components: Annotated[int, Range(1, 10**4, "each is held in memory")] = 1
    rank: Annotated[int, Range(1, 10**4, "each factor is held in memory")] = 1
    block_size: Count = 1


# --- configs -----------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a network's files lie."""

    path: FilePath | None = None
    hub_id: Text | None = None
    revision: Text | None = None
    variant: Text | None = None
    use_safetensors: bool = True


@dataclass
class Model(Place):
    """Of all kinds; lml.pipelines says what each asks."""

    _: dataclasses.KW_ONLY
    name: Text
    kind: Literal["pixel", "latent", "text"] = "pixel"
    network: Exact | None = None
    scheduler: Schedule | None = None
    patch: Annotated[int, Range(1, 256, "no image is a multiple of as many pixels")] = 1
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
    published_damping: dict[str, Positive] | None = None  # by evaluations, and "else"
    aligned_timesteps: list[Count] | None = None


@dataclass
class Solver:
    """Its options are those of its class, see `check_call`."""

    name: Text
    scheduler: Made
    step: dict[str, Any] | None = None
    published_target: Text | None = None
    published_damping: Positive | None = None  # whatever the model


@dataclass
class Grid:
    """What else is in it are options of the solver."""

    name: Text | None = None
    of_model: bool = False
    aligned_timesteps: list[Count] | None = None


@dataclass
class LML:
    """Ranges that hang together are lml.correction's to check."""

    rank: Whole
    damping: Positive | list[Positive | None] | None = None
    damping_scale: Literal["relative", "absolute"] = "relative"
    anchor: Literal["history", "ema"] = "history"
    kappa: Share = 0.0
    target: Literal["prediction", "increment", "direction"] = "prediction"
    norm_preserving: bool = True
    freeze: Share = 0.0
    length: Positive | list[Positive] = 1.0
    calibration: FilePath | None = None  # these two are of lml=calibrated alone
    objective: CalibrationObjective = "rmse"


@dataclass
class Logger:
    """Of wandb the rest."""

    name: Literal["none", "wandb"]
    project: Text | None = None
    entity: Text | None = None
    mode: Text = "auto"  # wandb knows which there are
    group: Text | None = None
    tags: list[Text] | None = None


@dataclass
class Search:
    """What a sweep is about."""

    objective: Text | None
    num_images: Images | None
    final_seed: Seed


@dataclass
class Searching:
    """The part of sample.yaml that a sweep needs before it has a cell."""

    metrics: dict[str, Made]
    sweep: Search | None = None


@dataclass
class Sample(Searching):
    """configs/sample.yaml"""

    _: dataclasses.KW_ONLY
    name: Name
    num_images: Images
    seed: Seed
    nfe: Evaluations
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
    reference: FilePath | None
    prompts: Made | Nothing
    model: Model
    solver: Solver
    grid: Grid
    lml: LML
    logger: Logger
    show: list[Text] | Text | None = None


@dataclass
class FineSolution:
    """What a calibration aims at."""

    solver: Text
    nfe: SeveralEvaluations | None


@dataclass
class Calibrate:
    """configs/calibrate.yaml"""

    nfe: SeveralEvaluations
    objective: CalibrationObjective
    searched: Samples
    unseen: Samples
    seed: Seed
    ranks: list[Annotated[int, Range(1, 64, "as many directions are held in memory")]]
    rounds: Annotated[int, Range(1, 10**6)]
    fine: FineSolution
    extractor: Made
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
    """configs/tabulate.yaml, of which the rest is configs/sample.yaml and is not used."""

    name: Name
    runs: FilePath | None
    out: FilePath | None
    show: list[Text] | Text | None


@dataclass
class Export:
    """configs/export.yaml"""

    layout: Made
    run_dir: FilePath | None
    out: FilePath
    prompts: Made | Nothing


@dataclass
class Budget:
    """How much and how to train. `images` is the total over all sittings, however long each is."""

    images: Steps = 3_000_000
    batch_size: Batch = 128
    lr: Positive = 4e-4
    weight_decay: NotNegative = 0.0
    warmup: Annotated[int, Range(1, 10**9)] = 500  # steps
    decay_from: Share = 0.6  # the share of the images after which the rate falls linearly to 0
    ema_inv_gamma: Positive = 8.0  # the average reaches back over the last eighth of the steps
    compile: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto is whichever is faster here
    save_minutes: NotNegative = 5.0
    report_every: Count = 10  # checkpoints; what takes time is measured then, and at the end
    seed: Seed = 0


@dataclass
class Data:
    """Where CIFAR-10 lies."""

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
    """How training draws them."""

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
    """The noise schedule to train with; what training reports are images of 20 evaluations."""

    num_train_timesteps: Annotated[int, Range(20, 10**6, "no training sees as many")] = 1000


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
    ranks: list[Annotated[int, Range(1, 64, "as many tensors are held in memory")]]
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
    """The schema of configs/`name`.yaml, as far as `config` chooses among several."""
    if name == "train":
        tasks = {"denoiser": TrainDenoiser, "features": TrainFeatures}
        task = config.get("task")
        return tasks.get(task, Train) if isinstance(task, str) else Train
    scripts = {
        "sample": Sample,
        "calibrate": Calibrate,
        "evaluate": Evaluate,
        "tabulate": Tabulate,
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
    """The same, to make the run again."""

    name: str
    batch_size: Count
    compile: bool
    channels_last: bool
    attention: Attention | None
    prompts: Made | Nothing


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
    """Of a run, by what took them."""

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
    seal: Any = None  # lml.seals.why_not_sealed says what it thinks of it


@dataclass
class Score:
    """What one metric says in metrics.json."""

    value: float | dict[str, float | None]
    protocol: dict[str, Any]
    warning: str = ""
    seconds: float = 0.0
    steps: dict[str, list[float | None]] | None = None
    config_sha256: Sha256 | None = None
    seal: Any = None  # lml.seals.why_not_sealed says what it thinks of it


@dataclass(frozen=True)
class Cell:
    """A run that a sweep asks for, in sweep.yaml."""

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
class Error:
    """Of one choice of a calibration, on samples that it was not searched with."""

    unseen: float


@dataclass
class Errors:
    """By choice."""

    off: Error
    default: Error
    calibrated: Error


@dataclass
class Choice:
    """One number a step; see lml.calibration.search."""

    rank: Whole
    damping: list[Positive | None] | None
    length: list[Positive] | None = None


@dataclass
class CalibrationFile:
    """calibration.json"""

    settings: dict[str, Any]
    lml: LML
    chosen: Literal["off", "default", "calibrated"]
    calibrated: Choice
    errors: Errors
    seal: Any = None


@dataclass
class SearchState:
    """Of one search, as lml.calibration.search has it."""

    rank: Count
    steps: Count
    values: list[NotNegative]
    error: NotNegative
    mu: Positive
    rounds: Whole
    is_done: bool


@dataclass
class CalibrationState:
    """state.json of a calibration that was interrupted."""

    of: dict[str, Any]
    searches: list[SearchState]
    seal: Any = None


@dataclass
class Extractor:
    """What made features, by name and the hash of its weights."""

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
    """config.json of a network, in anybody's format: what would fill the memory."""

    layers_per_block: Layers | list[Layers | list[Layers]] | None = None
    transformer_layers_per_block: Layers | list[Layers | list[Layers]] | None = None
    num_layers: Layers | None = None
    num_single_layers: Layers | None = None
    num_hidden_layers: Layers | None = None
    num_decoder_layers: Layers | None = None


# --- checking ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The key of a value that does not fit, the value, and what is asked in its place."""

    key: str
    value: Any
    asked: str

    def __str__(self) -> str:
        if self.value is dataclasses.MISSING:
            return f"{self.key}: missing; {self.asked} is asked"
        return f"{self.key}={shown(self.value)}: {self.asked} is asked"


def shown(value: Any) -> str:
    """`value` as a part of one line."""
    text = "null" if value is None else str(value)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check(config: Any, schema: Any, key: str = "") -> None:
    """UserError, naming the key below `key`, unless `config` is what `schema` (a hint) says."""
    if problem := find_problem(schema, config, key):
        raise UserError(str(problem))


def check_whole(value: Any, key: str, least: int = 1) -> None:
    """UserError, naming the key, unless `value` is a whole number of at least `least`."""
    check(value, Annotated[int, Range(least)], key)


def check_call(
    function: Callable, arguments: Mapping[str, Any], key: str, lenient: bool = False
) -> None:
    """UserError, naming one below `key`, unless the arguments are what `function` takes.

    Nested `_target_`s are what they make; names that begin with "_" are Hydra's. With `lenient`
    None is always taken, as files of older versions have it.
    """
    hints = _hints(function)
    for name, value in arguments.items():
        hint = hints.get(str(name), Any)
        if lenient and value is None:
            continue
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{key}.{name}=nan: a number is asked")
        if name.startswith("_") or (isinstance(value, Mapping) and "_target_" in value):
            continue
        if problem := find_problem(hint, value, f"{key}.{name}"):
            raise UserError(str(problem))


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    """By argument; where the default is None, that is taken, too."""
    bodies = [function]
    if inspect.isclass(function):  # whose bases may take some of the arguments
        bodies = [base.__init__ for base in reversed(function.__mro__) if "__init__" in vars(base)]
    try:
        parameters, hints = inspect.signature(function).parameters, {}
        for body in bodies:
            hints |= typing.get_type_hints(inspect.unwrap(body), include_extras=True)
    except (TypeError, ValueError, NameError, AttributeError):  # of C, or not to be had
        return {}
    return {
        name: _loose(hints[name] if parameter.default is not None else hints[name] | None)
        for name, parameter in parameters.items()
        if name in hints and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _loose(hint: Any) -> Any:
    """`hint` with the types of the values that it lists: other people's lists are not complete."""
    if typing.get_origin(hint) is Literal:
        return Union[tuple(type(each) for each in typing.get_args(hint))]  # noqa: UP007
    if typing.get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(_loose, typing.get_args(hint)))]  # noqa: UP007
    return hint


@functools.cache
def _fields(schema: type) -> dict[str, tuple[Any, bool]]:
    """Of a schema: each key's hint, and whether it may be missing."""
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
    """What is wrong with `value`, called `key`, as a `hint`; None when nothing is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return None
    if origin in (Union, types.UnionType):
        problems = [find_problem(each, value, key) for each in arguments]
        if None in problems:
            return None
        # of what looks like it was meant
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
    else:  # a hint that says nothing here, or a class whose objects no config holds
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
    """What is asked, in words, where `value` is not it."""
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
