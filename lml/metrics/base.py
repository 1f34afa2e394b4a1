"""What a metric declares in its class, and how to find the class of a metric without making it.

Importing this module, or the class of a metric, loads no network and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, get_type_hints

from hydra.utils import get_object
from torchmetrics import Metric

from lml.configs import compose, names


class RunMetric(Metric):
    """A metric of a run: of its images, or of the trajectories behind them.

    A subclass sets `higher_is_better`, in its constructor `protocol`, and what else differs from
    the defaults below. The constructor may set what depends on its arguments.

    `update(images)` gets uint8 images (B, 3, H, W), batch by batch. Where they apply, further
    arguments follow in this order: reference images (see `reference_folder`), latents, prompts.
    `compute` returns one number or a dict of numbers. The dict may have an entry `steps`, a dict of
    lists with one number a step: it is written beside the value.

    Attributes:
        higher_is_better: whether a higher value is better; a mapping says it for each part.
        parts: the names in the dict that `compute` returns; () for one number. A search may be
            about one of them. Names that only some models add are left out, and `higher_is_better`
            knows them all the same.
        needs_prompts: whether `update` gets the images' prompts, a list of B strings.
        takes_latents: whether `update` gets the latents of the images and of their references, a
            pair of tensors (B, ...), where both runs kept them.
        least_images: how many images the metric needs at least.
        num_images: how many images the protocol expects; the value of fewer has a warning.
        trajectories: if above 0, `update` is called once, with the `Replay` of as many images.
        reference: what the images are compared with. Files that it leaves out are reported.
        protocol: how the value is computed, in types of JSON; it is written beside the value.
            Without one, the name of the class is written.
    """

    is_differentiable = False
    full_state_update = False

    higher_is_better: ClassVar[bool | Mapping[str, bool] | None] = None
    parts: ClassVar[tuple[str, ...]] = ()
    needs_prompts: ClassVar[bool] = False
    takes_latents: ClassVar[bool] = False
    least_images: int = 1
    num_images: int = 0
    trajectories: int = 0
    reference: Any = None
    protocol: Mapping[str, Any] = MappingProxyType({})

    def reference_folder(self, reference_run: Callable[..., Path] | None) -> Path | None:
        """The folder with a reference for each image, of the same file name; None if not needed.

        `reference_run(nfe=…, solver=…)` repeats the run with other settings and returns its folder
        of images. It is None for images without a run: UserError if the metric needs the run.
        """
        return None


def declared(metric: Metric | type[Metric] | None) -> RunMetric | type[RunMetric]:
    """The object whose attributes are the declarations of `metric`, a metric or its class.

    That is `metric` itself, or RunMetric for a metric of another library: it has the defaults.
    """
    cls = metric if isinstance(metric, type) else type(metric)
    return metric if issubclass(cls, RunMetric) else RunMetric


def class_of(metric: Any) -> type[Metric] | None:
    """The class of `metric`, which is a metric or a config whose `_target_` makes one.

    If the `_target_` is a function, its return type is the class. None if no class is found.
    """
    if isinstance(metric, Metric):
        return type(metric)
    try:
        target = get_object(str(metric["_target_"]))
        made = target if isinstance(target, type) else get_type_hints(target).get("return")
    except Exception:  # whatever the import of a module raises; `evaluate.build` reports it
        return None
    return made if isinstance(made, type) and issubclass(made, Metric) else None


@cache
def class_by_name(name: str) -> type[Metric] | None:
    """The class of the metric that configs/metrics/`name`.yaml makes; None without that file."""
    if name not in names("metrics"):
        return None
    return class_of(compose(f"+metrics={name}").metrics.get(name))


def is_higher_better(metric: type[Metric] | None, part: str = "") -> bool:
    """Whether higher is better for this class, or for a part of its value; False if unknown."""
    better = metric.higher_is_better if metric else None
    return bool(better.get(part) if isinstance(better, Mapping) else better)
