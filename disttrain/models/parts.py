"""A base model as its parts: what training, sampling and saving are given.

Invariant: all weights are float32, in evaluation mode and frozen; methods add their own parameters
or thaw a part deliberately. The VAE is not among the parts held in memory: training reads cached
latents, so it is loaded only when `load_vae` is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from disttrain.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from disttrain.models.loading import quiet_libraries
from disttrain.models.names import public_name

Module = TypeVar("Module", bound=nn.Module)
ALIGNMENT = 64  # bytes; what torch gives memory that it allocates itself
Weights = Mapping[str, torch.Tensor]


@dataclass
class BaseModel:
    """The parts of one Stable Diffusion 1.x or 2.x model.

    `scheduler` is the training noise schedule; `pipeline_scheduler` is the sampler the model came
    with, which saved pipelines keep. `digest` identifies the UNet, text encoder and VAE weights,
    `vae_digest` the VAE alone (latent caches are keyed by it). `vae_config` is the VAE's
    configuration, known without loading its weights. `notes` are sentences the person in front
    should see, such as a prediction type that had to be assumed.
    """

    name: str
    family: str  # "sd1" | "sd2"
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    pipeline_scheduler: Any
    vae_source: Callable[[], AutoencoderKL]
    vae_config: Mapping[str, Any]
    digest: str
    vae_digest: str
    notes: tuple[str, ...] = ()

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
        return self.scheduler.config["prediction_type"]

    @property
    def latent_channels(self) -> int:
        """Channels of a latent picture (4 in Stable Diffusion 1.x and 2.x)."""
        return self.vae_config["latent_channels"]

    @property
    def latent_scale(self) -> int:
        """Pixels along each side of one latent element (8 in Stable Diffusion)."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Factor from VAE latents to the UNet's latents of about unit variance."""
        return self.vae_config["scaling_factor"]

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the UNet was made for."""
        return self.unet.config["sample_size"] * self.latent_scale

    def load_vae(self) -> AutoencoderKL:
        """The VAE, read anew: float32, evaluation mode, frozen.

        Raises:
            ModelError: its weights are missing or damaged.
        """
        return frozen(self.vae_source())

    def save(
        self,
        folder: Path,
        *,
        unet: Weights | None = None,
        text_encoder: Weights | None = None,
        half: bool = False,
    ) -> None:
        """Write a complete diffusers folder that `StableDiffusionPipeline.from_pretrained` loads.

        `unet` and `text_encoder` are state dictionaries that replace the parts' own weights (of an
        average, or gathered from other ranks). `half` stores float16 instead of float32. The folder
        appears complete or not at all, and replaces one of that name.
        """
        dtype = torch.float16 if half else torch.float32
        with quiet_libraries(), atomic_folder(folder) as temporary:
            self._write_pipeline(temporary, unet, text_encoder, dtype)

    def _write_pipeline(
        self, folder: Path, unet: Weights | None, text_encoder: Weights | None, dtype: torch.dtype
    ) -> None:
        # Here because it imports every image processor, which costs a second and prints warnings.
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
            StableDiffusionPipeline,
        )

        pipeline = StableDiffusionPipeline(
            vae=_copy(self.load_vae(), None, dtype),
            text_encoder=_copy(self.text_encoder, text_encoder, dtype),
            tokenizer=self.tokenizer,
            unet=_copy(self.unet, unet, dtype),
            scheduler=self.pipeline_scheduler,
            safety_checker=None,  # pyright: ignore[reportArgumentType]
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        # Versions of transformers before 5, and tools built on them, read these two files.
        self.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
        # Every other program, and older transformers, look for the public names.
        text_weights = folder / "text_encoder" / "model.safetensors"
        tensors = read_tensors(text_weights)
        named = {public_name("text_encoder", name): tensor for name, tensor in tensors.items()}
        write_tensors(text_weights, named, {"format": "pt"})
        for part in ("unet", "vae"):
            config = folder / part / "config.json"
            # Equal models are equal files, wherever the base lay.
            kept = {k: v for k, v in read_json(config).items() if k != "_name_or_path"}
            write_json(config, kept)
        mode = (folder / "model_index.json").stat().st_mode
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(mode)  # safetensors leaves them readable by their owner only


def frozen(module: Module) -> Module:
    """The module itself in float32, evaluation mode, without gradients, in aligned memory.

    Weights read from a file lie wherever the file has them. The processor's matrix routines round
    differently at unaligned addresses, so the same weights would not always give the same bits.
    """
    module = module.float().eval().requires_grad_(False)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return module


def skeleton(build: Callable[[], Module]) -> Module:
    """What `build` builds, with weights that take no memory, no time and no random numbers.

    Load weights with `load_state_dict(..., assign=True)` before use.
    """
    with init_empty_weights(include_buffers=False):
        return build()


def empty_copy(module: Module) -> Module:
    """A module of the same class and configuration, without weights."""
    kind: Any = type(module)
    config: Any = module.config
    if isinstance(module, CLIPTextModel):
        return skeleton(lambda: kind(config))
    return skeleton(lambda: kind.from_config(config))


def _copy(module: Module, weights: Weights | None, dtype: torch.dtype) -> Module:
    """A copy on the CPU in `dtype`, so that saving leaves the training module untouched."""
    source = module.state_dict() if weights is None else weights
    copy = empty_copy(module)
    on_cpu = {name: tensor.detach().to("cpu", dtype) for name, tensor in source.items()}
    copy.load_state_dict(on_cpu, strict=True, assign=True)
    return copy
