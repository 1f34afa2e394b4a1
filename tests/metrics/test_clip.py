from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from torchmetrics.multimodal.clip_score import CLIPScore as TorchmetricsCLIPScore
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lml.errors import UserError
from lml.metrics.evaluate import build

SHORT = slice(0, 4)  # prompts of up to 12 tokens


@pytest.fixture
def metric(tiny_configs):
    return build({"clip_score": tiny_configs["clip_score"]})["clip_score"]


class Adapter(torch.nn.Module):
    """transformers' CLIPModel as torchmetrics calls it: embeddings, whatever the version."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels):
        output = self.model.get_image_features(pixels)
        return getattr(output, "pooler_output", output)

    def get_text_features(self, ids, mask):
        output = self.model.get_text_features(ids, mask)
        return getattr(output, "pooler_output", output)


def by_torchmetrics(folder, images, prompts):
    processor = transformers.CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    model = Adapter(transformers.CLIPModel.from_pretrained(folder).eval())
    reference = TorchmetricsCLIPScore(lambda: (model, processor))
    reference.update(images, prompts)
    return reference.compute().item()


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (48, 36)])
def test_torchmetrics(metric, clip_folder, pictures, size):
    images = F.interpolate(pictures.images[:8].float(), size).byte()
    prompts = pictures.prompts[SHORT] * 2
    expected = by_torchmetrics(clip_folder, images, prompts)
    assert expected > 1
    metric.update(images[:3], prompts[:3])
    metric.update(images[3:], prompts[3:])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)


def test_a_negative_mean_counts_as_zero_but_a_negative_image_as_it_is(metric, pictures):
    images, prompts = pictures.images[:4], pictures.prompts[SHORT]
    metric.update(images, prompts)
    positive = metric.compute().item()
    assert positive > 1
    metric.model.text_projection.weight.neg_()
    metric.update(images[:1], prompts[:1])
    lower = metric.compute().item()
    metric.reset()
    metric.update(images[:1], prompts[:1])
    assert metric.compute().item() == 0
    assert lower == pytest.approx((4 * positive + metric.total.item()) / 5, rel=1e-6)


def test_long_prompts_are_cut_before_their_closing_token_and_counted(metric, pictures):
    image = pictures.images[:1]
    totals = []
    # 10 letters and the two tokens around them are all that 12 tokens hold
    for prompt in ("a b c d e f g h i j", "a b c d e f g h i j k l m", "a b c d e f g h i k"):
        metric.reset()
        metric.update(image, [prompt])
        totals.append(metric.total.item())
        metric.compute()
        assert metric.protocol["prompts_truncated"] == (len(prompt) > 20)
    assert totals[0] == totals[1] != totals[2]


def test_the_protocol(metric, tiny_configs, pictures):
    assert metric.needs_prompts and metric.num_images == 30_000
    metric.update(pictures.images, pictures.prompts)
    metric.compute()
    protocol = dict(metric.protocol)
    extractor = protocol.pop("extractor")
    assert extractor["name"] == "CLIPModel" and len(extractor["sha256"]) == 64
    assert (extractor["source"], extractor["revision"]) == ("clip", None)
    assert protocol == {
        "scale": "max(100 * mean cosine, 0)",
        "resize": "shorter side resized, then the central square, to 32x32 "
        "(Pillow, bicubic, uint8)",
        "max_tokens": 12,
        "images_asked": 30_000,
        "prompts_truncated": 2,
    }


@pytest.mark.parametrize("name", ["clip_score", "clip_cosine"])
@pytest.mark.parametrize("prompts", [None, [], ["a"], ["a"] * 3])
def test_one_prompt_an_image(tiny_configs, pictures, name, prompts):
    metric = build({name: tiny_configs[name]})[name]
    with pytest.raises(UserError, match=rf"^metrics=\[{name}\]: \d prompts for 2 images"):
        metric.update(pictures.images[:2], prompts)


# --- the cosine itself -------------------------------------------------------------------------


@pytest.fixture
def cosine(tiny_configs):
    return build({"clip_cosine": tiny_configs["clip_cosine"]})["clip_cosine"]


def by_hand(folder, images, prompts):
    """The cosine of each image, one at a time, as T2I-CompBench's evaluator goes through them."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    process = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = dict(tokenizer([prompt], return_tensors="pt"))
        with torch.no_grad():
            out = model(pixel_values=process(image, return_tensors="pt").pixel_values, **inputs)
        embeddings = [x[0] / x[0].norm() for x in (out.image_embeds, out.text_embeds)]
        found.append((embeddings[0] @ embeddings[1]).item())
    return found


@pytest.mark.parametrize("sign", [1, -1])
def test_the_cosine_by_hand_in_its_own_scale_and_below_zero(cosine, clip_folder, pictures, sign):
    images = F.interpolate(pictures.images[:8].float(), (48, 36)).byte()
    prompts = pictures.prompts[SHORT] * 2
    expected = sum(by_hand(clip_folder, images, prompts)) / 8
    assert 0.01 < expected < 1
    cosine.model.text_projection.weight.mul_(sign)
    cosine.update(images[:3], prompts[:3])
    cosine.update(images[3:], prompts[3:])
    assert cosine.compute().item() == pytest.approx(sign * expected, rel=1e-5)


def test_the_protocol_says_which_of_the_two_it_is(cosine, pictures):
    cosine.update(pictures.images, pictures.prompts)
    cosine.compute()
    assert cosine.protocol["scale"] == "mean cosine"
    assert cosine.protocol["extractor"]["source"] == "clip"
    assert cosine.protocol["prompts_truncated"] == 2


def test_weights_as_they_were_published(cosine, clip_folder, pictures, tmp_path):
    """ViT-B/32 is published as pytorch_model.bin."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip/model.safetensors").unlink()
    torch.save(cosine.model.state_dict(), tmp_path / "clip/pytorch_model.bin")
    config = {"_target_": "lml.metrics.clip.clip_cosine", "model": str(tmp_path / "clip")}
    pickled = build({"clip_cosine": config})["clip_cosine"]
    for metric in (cosine, pickled):
        metric.update(pictures.images, pictures.prompts)
    assert pickled.compute() == cosine.compute()
