"""A diffusers folder (tokenizer, text_encoder, unet, scheduler, vae) becomes a `BaseModel`.

Invariant: nothing is left at random values: a weight missing from the files is an error, where the
libraries would only warn. Weights are read from safetensors, or from `.bin` files without executing
anything in them.
"""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from disttrain.errors import DataError, ModelError
from disttrain.files import read_json
from disttrain.models.loading import one_line, quiet_libraries, weights_digest
from disttrain.models.parts import BaseModel, frozen
from disttrain.models.vocabulary import MAX_TOKENS

SUPPORTED = "Stable Diffusion 1.x and 2.x are"
PIPELINES_NOT_SUPPORTED = ("XL", "3", "Flux", "Inpaint", "InstructPix2Pix", "Upscale", "Depth2Img")
SD2_CONTEXT_WIDTH = 1024
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
LOAD_ERRORS += (pickle.UnpicklingError, EOFError)


def weight_files(part: str) -> list[str]:
    """The files that may hold the weights of a part ("unet", "text_encoder", "vae"), best first."""
    if part == "text_encoder":
        stems = {"safetensors": "model", "bin": "pytorch_model"}
    else:
        stems = dict.fromkeys(("safetensors", "bin"), "diffusion_pytorch_model")
    return [
        f"{part}/{stems[kind]}{variant}.{kind}"
        for variant in ("", ".fp16")
        for kind in ("safetensors", "bin")
    ]


def load_folder(folder: Path, name: str, prediction_type: str | None = None) -> BaseModel:
    """The model in a diffusers folder.

    Args:
        name: what the model is called in messages and metadata.
        prediction_type: overrides what the folder's scheduler says.

    Raises:
        ModelError: not a Stable Diffusion 1.x or 2.x folder, or a part is missing or damaged.
    """
    _check_pipeline(folder)
    unet_config = _config(folder, "unet")
    vae_config = _config(folder, "vae")
    _check_unet(folder, unet_config, vae_config["latent_channels"])
    files = {part: _find_weights(folder, part) for part in ("unet", "text_encoder", "vae")}
    tokenizer = _load_tokenizer(folder)
    text_encoder = frozen(_load_part(CLIPTextModel, files["text_encoder"]))
    rows = text_encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{folder}: its tokenizer has {len(tokenizer)} entries, its text encoder only {rows}"
        )
    scheduler, pipeline_scheduler = _load_schedulers(folder, prediction_type)
    named = {part: (str(path.relative_to(folder)), path) for part, path in files.items()}
    return BaseModel(
        name=name,
        family="sd2" if unet_config["cross_attention_dim"] == SD2_CONTEXT_WIDTH else "sd1",
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=frozen(_load_part(UNet2DConditionModel, files["unet"])),
        scheduler=scheduler,
        pipeline_scheduler=pipeline_scheduler,
        vae_source=lambda: _load_part(AutoencoderKL, files["vae"]),
        vae_config=vae_config,
        digest=weights_digest(named.values()),
        vae_digest=weights_digest([named["vae"]]),
    )


def _check_pipeline(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.exists() and not (folder / "unet").is_dir():
        raise ModelError(
            f"{folder}: no diffusers model (no model_index.json and no unet folder in it)"
        )
    kind = str(_json(index).get("_class_name", "")) if index.exists() else ""
    if any(word in kind for word in PIPELINES_NOT_SUPPORTED):
        raise ModelError(f"{folder}: {kind} is not supported yet: {SUPPORTED}")


def _check_unet(folder: Path, config: dict[str, Any], latent_channels: int) -> None:
    width = config["cross_attention_dim"]
    if not isinstance(width, int) or config.get("addition_embed_type") is not None:
        raise ModelError(f"{folder}: this kind of UNet is not supported yet: {SUPPORTED}")
    if config["in_channels"] != latent_channels:
        raise ModelError(
            f"{folder}: its UNet takes {config['in_channels']} channels (inpainting or editing),"
            " which is not supported yet; use the text-to-image model it came from"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except DataError as error:
        raise ModelError(str(error)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a model's configuration")
    return value


def _config(folder: Path, part: str) -> dict[str, Any]:
    """The part's configuration with the library's defaults filled in."""
    path = folder / part / "config.json"
    kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
    found = _json(path)
    if found.get("_class_name", kind.__name__) != kind.__name__:
        raise ModelError(f"{path}: {found['_class_name']} is not supported yet: {SUPPORTED}")
    expected, _, _ = kind.extract_init_dict(found)
    return {**_defaults(kind), **expected}


def _defaults(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _find_weights(folder: Path, part: str) -> Path:
    candidates = weight_files(part)
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    raise ModelError(f"{folder}: no weights of the {part}; expected {candidates[0]} in it")


def _load_part(kind: Any, weights: Path) -> Any:
    """A model from the folder of its weight file, complete and in float32."""
    load: Any = kind.from_pretrained
    variant = "fp16" if weights.name.split(".")[1] == "fp16" else None
    options: dict[str, Any] = {"variant": variant, "local_files_only": True}
    options["use_safetensors"] = weights.suffix == ".safetensors"
    options["dtype" if kind is CLIPTextModel else "torch_dtype"] = torch.float32
    try:
        with quiet_libraries():
            model, report = load(weights.parent, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise ModelError(f"{weights}: cannot be loaded ({one_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{weights}: {len(missing)} weights are missing, such as {missing[0]}")
    return model


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    place = folder / "tokenizer"
    if not (place / "vocab.json").exists() and not (place / "tokenizer.json").exists():
        raise ModelError(f"{place}: no vocab.json or tokenizer.json in it")
    try:
        with quiet_libraries():
            kind: Any = CLIPTokenizer
            tokenizer = kind.from_pretrained(place, local_files_only=True)
    except LOAD_ERRORS as error:
        raise ModelError(f"{place}: cannot be loaded ({one_line(error)})") from error
    if tokenizer.model_max_length > MAX_TOKENS:
        tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def _load_schedulers(folder: Path, prediction_type: str | None) -> tuple[DDPMScheduler, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    config = _json(path)
    changes = {} if prediction_type is None else {"prediction_type": prediction_type}
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        raise ModelError(f"{path}: unknown scheduler {config.get('_class_name')!r}")
    try:
        with quiet_libraries():
            training_kind: Any = DDPMScheduler
            training = training_kind.from_config(config, clip_sample=False, **changes)
            return training, kind.from_config(config, **changes)
    except LOAD_ERRORS as error:
        raise ModelError(f"{path}: {one_line(error)}") from error
