"""The ComfyUI node, called as ComfyUI calls it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from test_denoiser import METHODS, Exact, karras, start
from torch import Tensor

from lml import LMLDenoiser
from lml.data.assets import ROOT

FOLDER = ROOT / "integrations/comfyui"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The module, found as ComfyUI finds what is in its custom_nodes."""
    file = FOLDER / "__init__.py"
    spec = importlib.util.spec_from_file_location("custom_nodes_lml", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ModelPatcher:
    """ComfyUI's, as far as this node goes: a clone has options of its own."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], options: dict | None = None):
        self.network, self.model_options = network, options or {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        return ModelPatcher(self.network, _copied(self.model_options))

    def set_model_sampler_post_cfg_function(self, function, disable_cfg1_optimization=False):
        functions = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*functions, function]

    def sample(
        self, method: Callable, x: Tensor, sigmas: Tensor, scale: float = 1.0, calls: int = 1000
    ) -> Tensor:
        """A KSampler's run, with guidance `scale`; cancelled after so many `calls`."""
        options = _copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            if (calls := calls - 1) < 0:
                raise InterruptedError
            sigma = sigma.expand(len(x))
            cond = self.network(x, sigma)
            denoised = 0.5 * x + (cond - 0.5 * x) * scale
            for function in options.get("sampler_post_cfg_function", []):
                args = {"denoised": denoised, "cond": None, "uncond": None, "model": self.network}
                args |= {"uncond_denoised": 0.5 * x, "cond_denoised": cond, "cond_scale": scale}
                denoised = function(args | {"sigma": sigma, "model_options": options, "input": x})
            return denoised

        return method(denoiser, x, sigmas)


def _copied(options: dict) -> dict:
    """As ComfyUI copies them: dictionaries and lists, but not what is in these."""
    return {key: value.copy() for key, value in options.items()}


def patch(nodes: ModuleType, model: ModelPatcher, **inputs) -> ModelPatcher:
    """What the node makes of `model`, with the defaults of its inputs where none are given."""
    node = nodes.NODE_CLASS_MAPPINGS["LMLPatch"]
    described = node.INPUT_TYPES()["required"]
    values = {
        name: kind[0] if isinstance(kind, list) else options[0]["default"]
        for name, (kind, *options) in described.items()
        if name != "model"
    }
    assert list(inspect.signature(node.patch).parameters) == ["self", *described]
    assert node.RETURN_TYPES == ("MODEL",)
    (patched,) = getattr(node(), node.FUNCTION)(model=model, **values | inputs)
    return patched


@pytest.mark.parametrize("sampler", METHODS)
@pytest.mark.parametrize("inputs", [{"damping": 3.0, "rank": 1}, {"norm_preserving": False}, {}])
def test_it_is_the_wrapper_around_the_guided_denoiser(nodes, sampler, inputs):
    exact, method = Exact(), METHODS[sampler]
    model = ModelPatcher(exact)
    patched = patch(nodes, model, sampler=sampler, **inputs)
    # of different lengths, one cut short before a lower start, and the same one again
    for steps, high, calls in ((5, 80.0, 99), (8, 80.0, 3), (5, 5.0, 99), (5, 5.0, 99)):
        sigmas = karras(steps, high=high)
        x = start(sigmas, seed=steps)
        if calls < steps:
            with pytest.raises(InterruptedError):
                patched.sample(method, x, sigmas, 2.0, calls)
            continue
        wrapped = LMLDenoiser(
            lambda x, sigma: 0.5 * x + (exact(x, sigma) - 0.5 * x) * 2.0,
            sampler=sampler,
            steps=steps,
            **inputs,
        )
        found = patched.sample(method, x, sigmas, 2.0)
        assert torch.equal(found, method(wrapped, x, sigmas))
        assert not torch.equal(found, model.sample(method, x, sigmas, 2.0))


def test_it_leaves_the_model_and_its_other_patches_alone(nodes):
    model, sigmas = ModelPatcher(Exact()), karras(4)
    x = start(sigmas)
    halved = model.clone()
    halved.set_model_sampler_post_cfg_function(lambda args: 0.5 * args["denoised"])
    both = patch(nodes, halved, damping=3.0)
    assert "sampler_post_cfg_function" not in model.model_options
    assert len(halved.model_options["sampler_post_cfg_function"]) == 1
    wrapped = LMLDenoiser(lambda x, sigma: 0.5 * model.network(x, sigma), damping=3.0)
    method = METHODS["dpmpp_2m"]
    torch.testing.assert_close(both.sample(method, x, sigmas), method(wrapped, x, sigmas))
    off = patch(nodes, model, rank=0)
    assert torch.equal(off.sample(method, x, sigmas), model.sample(method, x, sigmas))


def test_as_it_is_dropped_into_a_graph_it_does_no_harm(nodes):
    model, sigmas = ModelPatcher(Exact()), karras(10)
    x, patched = start(sigmas), patch(nodes, ModelPatcher(Exact()))
    for method in METHODS.values():
        change = patched.sample(method, x, sigmas) - model.sample(method, x, sigmas)
        assert 0 < change.abs().max() < 1e-3


def test_its_page_names_its_inputs(nodes):
    page = (FOLDER / "README.md").read_text()
    inputs = nodes.NODE_CLASS_MAPPINGS["LMLPatch"].INPUT_TYPES()["required"]
    assert all(f"`{name}`" in page for name in inputs if name != "model")
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS["LMLPatch"] in page and f"*{nodes.ANY}*" in page
    assert len(page.splitlines()) <= 14
