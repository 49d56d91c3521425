"""Results in a stock diffusers pipeline: it draws what the trainer's own sampling draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import disttrain
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image

from disttrain.config_file import load_config
from disttrain.data.images import read_png_text
from disttrain.models.sampler import DrawSettings
from disttrain.review.sample import SampleRequest, draw, sample

PROMPTS = {
    "textual_inversion": "a photo of <fox> in the snow",
    "lora": "a photo of sks fox in the snow",
    "dreambooth": "a photo of sks fox in the snow",
}


def stock_pipeline(method: str, run: Path, tiny_folder: Path) -> Any:
    """What a user of diffusers would write."""
    folder = run / "subjects/fox/model" if method == "dreambooth" else tiny_folder
    pipeline: Any = StableDiffusionPipeline.from_pretrained(str(folder))
    result = str(run / "subjects/fox/fox.safetensors")
    if method == "lora":
        pipeline.load_lora_weights(result)
    if method == "textual_inversion":
        pipeline.load_textual_inversion(result)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_picture(pipeline: Any, prompt: str, seed: int) -> np.ndarray:
    drawn = pipeline(
        prompt,
        num_inference_steps=5,
        guidance_scale=4.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return drawn.images[0]


@pytest.mark.parametrize("method", PROMPTS)
def test_stock_pipeline_draws_the_same(
    method: str, trained: dict[str, Path], tiny_folder: Path
) -> None:
    run, prompt = trained[method], PROMPTS[method]
    config = load_config(run / "config.yaml")
    request = SampleRequest(prompt, count=2, seed=3, steps=5, guidance_scale=4.0)
    settings = DrawSettings(5, 4.0, 64, 64)
    ours = draw(config, run, config.subjects[0], prompt, request, settings)
    pipeline = stock_pipeline(method, run, tiny_folder)
    for i in range(2):
        assert np.abs(ours[i] - stock_picture(pipeline, prompt, 3 + i)).max() < 1e-4
    if method == "lora":
        pipeline.unload_lora_weights()
    untaught: Any = StableDiffusionPipeline.from_pretrained(str(tiny_folder))
    untaught.scheduler = DDIMScheduler.from_config(untaught.scheduler.config)
    untaught.set_progress_bar_config(disable=True)
    without = stock_picture(untaught, prompt, 3)
    assert np.abs(ours[0] - without).max() > 1e-3, "the result changes nothing"


@pytest.mark.parametrize("method", PROMPTS)
def test_last_preview_is_what_the_result_draws(
    method: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The trainer's layers and the file written from them give the same picture, drawn as the run
    draws its previews unless told otherwise."""
    run = trained[method]
    request = SampleRequest("a photo of {token}", seed=0)
    (path,) = sample(run, request, tmp_path)
    preview = run / "subjects/fox/samples/00000006-0.png"
    left, right = (np.asarray(Image.open(p), dtype=int) for p in (path, preview))
    assert np.abs(left - right).max() <= 1
    token = "<fox>" if method == "textual_inversion" else "sks"
    assert read_png_text(preview)["parameters"].startswith(f"a photo of {token}\nSteps: 4")


def test_sample_command_never_overwrites_and_names_what_is_missing(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    run = trained["lora"]
    arguments = ("sample", run, "--prompt", "a {token}", "--steps", "2", "--output", tmp_path)
    names = [Path(disttrain(*arguments).stdout.strip()).name for _ in range(2)]
    assert names == ["fox-seed0.png", "fox-seed0-2.png"]
    missing = disttrain(*arguments, "--step", "4")
    assert missing.returncode == 2
    assert "there are copies at --step 3, 6" in missing.stderr
    assert disttrain(*arguments, "--step", "3").returncode == 0
