"""LML schedulers inside real diffusers pipelines: made, swapped in, sampled, saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)

from lml import schedulers
from lml.pipelines import tiny as tiny_pipelines

# What Stable Diffusion runs on; FlowMatchEuler and IPNDM have noise schedules of their own.
FOR_STABLE_DIFFUSION = [
    cls
    for cls in schedulers.LMLSchedulerMixin.__subclasses__()
    if cls.__bases__[-1] in PNDMScheduler().compatibles
]


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_pipelines.stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ddpm():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return DDPMPipeline(unet, DDPMScheduler())


def sample(pipe, **options):
    call = {
        "num_inference_steps": 6,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
        **options,
    }
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(**call).images)


@pytest.mark.parametrize(
    "cls", [schedulers.LMLDDIMScheduler, schedulers.LMLDPMSolverMultistepScheduler]
)
def test_ddpm_pipeline(ddpm, cls):
    pipe = DDPMPipeline(ddpm.unet, ddpm.scheduler)
    pipe.scheduler = cls.__bases__[-1].from_config(pipe.scheduler.config)
    plain = sample(pipe, batch_size=2)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, rank=0)
    assert torch.equal(sample(pipe, batch_size=2), plain)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, rank=2, damping=1.0)
    corrected = sample(pipe, batch_size=2)
    assert corrected.isfinite().all() and not torch.equal(corrected, plain)
    # not bfloat16: the pipeline hands its images to numpy, which does not know that type
    pipe.to(torch.float16)
    assert sample(pipe, batch_size=2).isfinite().all()
    pipe.to(torch.float32)


@pytest.mark.parametrize("cls", FOR_STABLE_DIFFUSION)
@pytest.mark.parametrize("guidance", [1.0, 7.5], ids=["unguided", "guided"])
def test_stable_diffusion(stable_diffusion, cls, guidance):
    pipe = StableDiffusionPipeline(**stable_diffusion.components, requires_safety_checker=False)
    options = {"prompt": ["a cat", "a dog"], "guidance_scale": guidance}
    pipe.scheduler = cls.__bases__[-1].from_config(stable_diffusion.scheduler.config)
    plain = sample(pipe, **options)
    pipe.scheduler = cls.from_config(stable_diffusion.scheduler.config, rank=0)
    assert torch.equal(sample(pipe, **options), plain)
    pipe.scheduler = cls.from_config(stable_diffusion.scheduler.config, rank=2, damping=1.0)
    shapes = []
    pipe.scheduler.correction.register_forward_hook(
        lambda _, arguments, output: shapes.append(arguments[0].shape[0])
    )
    corrected = sample(pipe, **options)
    assert corrected.isfinite().all() and not torch.equal(corrected, plain)
    assert set(shapes) == {2}  # after guidance: one direction an image


@pytest.mark.parametrize("cls", FOR_STABLE_DIFFUSION)
def test_stable_diffusion_in_bfloat16(stable_diffusion, cls):
    pipe = StableDiffusionPipeline(**stable_diffusion.components, requires_safety_checker=False)
    pipe.scheduler = cls.from_config(stable_diffusion.scheduler.config)
    pipe.to(torch.bfloat16)
    assert sample(pipe, prompt="a cat").isfinite().all()
    pipe.to(torch.float32)


@pytest.mark.parametrize("cls", FOR_STABLE_DIFFUSION)
def test_image_to_image(stable_diffusion, cls):
    pipe = StableDiffusionImg2ImgPipeline(
        **stable_diffusion.components, requires_safety_checker=False
    )
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"prompt": "a cat", "image": image, "strength": 0.8, "num_inference_steps": 10}
    pipe.scheduler = cls.__bases__[-1].from_config(stable_diffusion.scheduler.config)
    plain = sample(pipe, **options)
    pipe.scheduler = cls.from_config(stable_diffusion.scheduler.config, rank=0)
    assert torch.equal(sample(pipe, **options), plain)
    pipe.scheduler = cls.from_config(stable_diffusion.scheduler.config)
    assert sample(pipe, **options).isfinite().all()


@pytest.mark.parametrize("parent", [DDIMScheduler, EulerDiscreteScheduler])
def test_views_of_a_panorama_do_not_correct_one_another(stable_diffusion, parent):
    """The pipeline restores the scheduler's `__dict__` for every view."""
    pipe = StableDiffusionPanoramaPipeline(
        **stable_diffusion.components, requires_safety_checker=False
    )
    # of 8 x 8 latents, where the pipeline's own are of 64 x 64
    pipe.get_views = lambda *_, **__: [(0, 8, left, left + 8) for left in (0, 4, 8)]
    ours = getattr(schedulers, f"LML{parent.__name__}")

    def difference(scheduler) -> torch.Tensor:
        """Between one view at a time and all of them in a batch: rounding, for the parent."""
        pipe.scheduler = scheduler
        options = {"prompt": "a cat", "height": 16, "width": 32}
        images = [sample(pipe, **options, view_batch_size=count) for count in (1, 3)]
        return (images[0] - images[1]).abs().max()

    config = stable_diffusion.scheduler.config
    assert difference(parent.from_config(config)) < 1e-4
    assert difference(ours.from_config(config, rank=2, damping=0.5)) < 1e-4


def test_custom_timesteps_and_sigmas(stable_diffusion):
    pipe = StableDiffusionPipeline(**stable_diffusion.components, requires_safety_checker=False)
    config = stable_diffusion.scheduler.config
    timesteps = {"prompt": "a cat", "timesteps": [900, 600, 300, 100]}
    pipe.scheduler = schedulers.LMLDPMSolverMultistepScheduler.from_config(config)
    assert sample(pipe, **timesteps).isfinite().all()
    pipe.scheduler = schedulers.LMLEulerDiscreteScheduler.from_config(config)
    assert sample(pipe, prompt="a cat", sigmas=[10.0, 3.0, 1.0, 0.3]).isfinite().all()


def test_a_pipeline_keeps_its_lml_scheduler_on_disk(stable_diffusion, tmp_path):
    pipe = StableDiffusionPipeline(**stable_diffusion.components, requires_safety_checker=False)
    pipe.scheduler = schedulers.LMLUniPCMultistepScheduler.from_config(
        pipe.scheduler.config, rank=3, damping=4.0
    )
    expected = sample(pipe, prompt="a cat")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["lml.schedulers", "LMLUniPCMultistepScheduler"]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is schedulers.LMLUniPCMultistepScheduler
    assert (loaded.scheduler.correction.rank, loaded.scheduler.correction.damping) == (3, 4.0)
    assert torch.equal(sample(loaded, prompt="a cat"), expected)
    swapped = StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=pipe.scheduler)
    assert torch.equal(sample(swapped, prompt="a cat"), expected)
