"""RunConfig: everything a run depends on, as one tree of frozen, typed settings.

First link of the pipeline: YAML and dotted overrides come in, every other module reads this tree.
Invariant: a `RunConfig` from `load_config` passed every check that needs neither torch nor the base
model. The string under each field is its help text (`disttrain keys` prints it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from disttrain import schema
from disttrain.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
METHODS_WITH_CLASS_WORD = ("lora", "dreambooth")


@dataclass(frozen=True)
class PriorSettings:
    """Prior preservation (Ruiz et al. 2022): pictures of the class keep the class as it was."""

    num_class_images: int = 0
    """Class pictures to train beside the subject's; 0 means no prior preservation. When the
    subject's class_images folder holds fewer, the base model draws the rest."""
    prior_loss_weight: float = 1.0
    """Weight of the class pictures' loss beside the subject's."""
    class_guidance_scale: float = 7.5
    """Guidance scale for class pictures that the base model draws."""
    class_infer_steps: int = 40
    """Denoising steps for class pictures that the base model draws."""


@dataclass(frozen=True)
class TextualInversionSettings:
    """New token vectors for the text encoder; nothing else changes (Gal et al. 2022)."""

    name: Literal["textual_inversion"] = "textual_inversion"
    """Which method; textual_inversion learns vectors for one new token per subject."""
    num_vectors: int = 1
    """Vectors that the new token stands for, 1 to 75."""
    init_text: str = "*"
    """Words whose vectors the new ones start from, spread over num_vectors; empty means zeros."""


@dataclass(frozen=True)
class LoraSettings(PriorSettings):
    """Low-rank changes to the attention layers (Hu et al. 2021)."""

    name: Literal["lora"] = "lora"
    """Which method; lora learns a small file of low-rank changes per subject."""
    rank: int = 8
    """Rank of each change; higher learns more detail and makes a larger file."""
    alpha: float = 8.0
    """Scale of the change is alpha / rank; alpha = rank leaves it at 1."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers of the UNet that get a change, by the end of their name."""
    train_text_encoder: bool = False
    """Also change the text encoder."""
    text_encoder_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Linear layers of the text encoder that get a change, by the end of their name."""


@dataclass(frozen=True)
class DreamboothSettings(PriorSettings):
    """The whole UNet learns the subject (Ruiz et al. 2022); the result is a complete model."""

    name: Literal["dreambooth"] = "dreambooth"
    """Which method; dreambooth trains the model itself, one subject at a time."""
    train_text_encoder: bool = False
    """Also train the text encoder."""


MethodSettings = TextualInversionSettings | LoraSettings | DreamboothSettings


@dataclass(frozen=True)
class SubjectSettings:
    """One result to make: its pictures and the words that will mean it."""

    name: str
    """Name of the result; the files are subjects/NAME/NAME.safetensors."""
    images: str
    """A folder of pictures (a same-stem .txt is its caption), or the index.json of tar shards."""
    token: str
    """The word that will mean the subject; for textual inversion the name of the new token."""
    class_name: str = ""
    """What kind of thing it is, in the base model's words: fox, dog, person."""
    instance_prompt: str = ""
    """Training prompt with {token}, {class_name}, {caption}; empty: the method's usual one."""
    template: str = ""
    """File of training prompts, a line each, with [name] and [filewords]; instead of
    instance_prompt. Looked up as a path, then in templates/."""
    class_images: str = ""
    """Folder of class pictures for prior preservation; drawn ones go to output_dir/.cache."""
    class_prompt: str = "a photo of {class_name}"
    """Prompt for class pictures, when training on them and when the base model draws them."""


@dataclass(frozen=True)
class DataSettings:
    """How pictures become batches."""

    resolution: int = 512
    """Side of the square training pictures in pixels; a multiple of 8."""
    batch_size: int = 1
    """Pictures of one subject per step, process and accumulation step."""
    center_crop: bool = True
    """Crop the middle of pictures that are not square; false draws the place of the crop."""
    cached_crops: int = 4
    """With center_crop false: different crops kept per picture, one drawn each time it is seen."""
    random_flip: bool = False
    """Mirror each picture left to right with probability one half."""
    latent_sampling: Literal["random", "deterministic", "once"] = "random"
    """Sample of the autoencoder's posterior: drawn afresh each time, its mean, or drawn once."""


@dataclass(frozen=True)
class OptimSettings:
    """How weights change."""

    learning_rate: float
    """Base learning rate; scale_lr says what it is multiplied by."""
    text_encoder_learning_rate: float | None = None
    """Base learning rate of the text encoder where it is trained; empty: learning_rate."""
    optimizer: Literal["adamw"] = "adamw"
    """The optimizer; adamw is Loshchilov and Hutter's decoupled weight decay."""
    scale_lr: Literal["linear", "sqrt", "none"] = "linear"
    """Multiply the learning rate by data-parallel processes x batch_size x
    gradient_accumulation_steps (linear), its square root (sqrt), or nothing (none)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to zero at max_steps in a line or a half cosine."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Largest norm of each subject's gradient; 0 means no clipping."""
    adam_beta1: float = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float | None = None
    """Decoupled weight decay; empty: 0 for textual inversion (vectors have no natural scale to
    shrink to), 0.01 for lora and dreambooth."""


@dataclass(frozen=True)
class TrainSettings:
    """How long a run is and what it leaves behind on the way."""

    max_steps: int
    """Optimizer steps for each subject."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them in memory."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end and on interruption."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    sample_every: int = 0
    """Steps between preview pictures; 0 draws none but those at the end."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the previews, with {token} and {class_name}; empty: no previews."""
    sample_negative_prompt: str = ""
    """What previews should not show."""
    sample_steps: int = 20
    """Denoising steps of a preview."""
    sample_guidance_scale: float = 7.5
    """Guidance scale of a preview; 1 means none."""
    sample_seed: int = 0
    """Seed of the first preview of each prompt."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers to log to besides metrics.jsonl."""


@dataclass(frozen=True)
class RunConfig:
    """One run: a base model, a method, and the subjects to teach."""

    name: str
    """Name of the run; its folder is output_dir/name."""
    method: MethodSettings
    """How subjects are taught."""
    subjects: tuple[SubjectSettings, ...]
    """Results to make; textual inversion and lora train them together, dreambooth in turn."""
    optim: OptimSettings
    """How weights change."""
    train: TrainSettings
    """How long and what is left behind."""
    data: DataSettings = field(default_factory=DataSettings)
    """How pictures become batches."""
    output_dir: str = "runs"
    """Folder that holds run folders, and the cache of latents they share."""
    base_model: str = "tiny"
    """tiny (embedded), a diffusers folder, a hub id, or a .safetensors or .ckpt file."""
    base_revision: str = ""
    """Branch, tag or commit of a hub id; empty: its default branch."""
    base_prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base predicts; auto reads it from the model's own scheduler settings."""
    seed: int = 0
    """Seed of everything drawn in this run."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward and backward pass; fp16 needs a GPU."""

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.output_dir) / self.name

    @property
    def cache_folder(self) -> Path:
        """Where latents are cached, shared by the runs of one output_dir."""
        return Path(self.output_dir) / ".cache"

    @property
    def packable(self) -> bool:
        """Whether subjects train together over one frozen base."""
        return not isinstance(self.method, DreamboothSettings)

    @property
    def prior(self) -> PriorSettings | None:
        """Prior preservation when it is on."""
        method = self.method
        return method if isinstance(method, PriorSettings) and method.num_class_images else None

    @property
    def weight_decay(self) -> float:
        """Weight decay with the method's default filled in."""
        if self.optim.weight_decay is not None:
            return self.optim.weight_decay
        return 0.0 if isinstance(self.method, TextualInversionSettings) else 0.01


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked settings of a config file with overrides laid over it.

    Raises:
        ConfigError: anything that `disttrain` can see to be wrong before it loads a model.
    """
    return parse_config(schema.apply_overrides(schema.read_mapping(path), overrides))


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """The checked settings of a plain mapping; raises `ConfigError` as `load_config` does."""
    config = schema.build(RunConfig, tree)
    _check_run(config)
    _check_numbers(config)
    for i, subject in enumerate(config.subjects):
        _check_subject(config, subject, f"subjects.{i}")
    return config


def _refuse(key: str, problem: str) -> None:
    raise ConfigError(f"{key}: {problem}")


def _check_run(config: RunConfig) -> None:
    if not NAME.fullmatch(config.name):
        _refuse("name", f"{config.name!r} is no folder name; use letters, digits, dot, dash")
    if not config.subjects:
        _refuse("subjects", "empty; name at least one subject to teach")
    names = [subject.name for subject in config.subjects]
    for i, name in enumerate(names):
        if name.lower() in (other.lower() for other in names[:i]):
            _refuse(f"subjects.{i}.name", f"{name!r} is used twice; each result needs its own name")
    method = config.method
    if isinstance(method, LoraSettings):
        if not method.target_modules:
            _refuse("method.target_modules", "empty; name at least one layer, such as to_q")
        if method.train_text_encoder and not method.text_encoder_target_modules:
            _refuse("method.text_encoder_target_modules", "empty; name one, such as q_proj")
    trains_text = isinstance(method, PriorSettings) and getattr(method, "train_text_encoder", False)
    if config.optim.text_encoder_learning_rate is not None and not trains_text:
        _refuse(
            "optim.text_encoder_learning_rate",
            "the text encoder is not trained; set method.train_text_encoder: true or remove it",
        )
    if config.train.sample_every > 0 and not config.train.sample_prompts:
        _refuse("train.sample_prompts", "empty while sample_every asks for previews; add a prompt")


def _check_numbers(config: RunConfig) -> None:
    method, data, optim, train = config.method, config.data, config.optim, config.train
    at_least: list[tuple[str, float, float]] = [
        ("seed", config.seed, 0),
        ("data.resolution", data.resolution, 8),
        ("data.batch_size", data.batch_size, 1),
        ("data.cached_crops", data.cached_crops, 1),
        ("optim.lr_warmup_steps", optim.lr_warmup_steps, 0),
        ("optim.max_grad_norm", optim.max_grad_norm, 0),
        ("optim.weight_decay", config.weight_decay, 0),
        ("train.max_steps", train.max_steps, 1),
        ("train.gradient_accumulation_steps", train.gradient_accumulation_steps, 1),
        ("train.checkpoint_every", train.checkpoint_every, 1),
        ("train.keep_checkpoints", train.keep_checkpoints, 1),
        ("train.sample_every", train.sample_every, 0),
        ("train.sample_steps", train.sample_steps, 1),
        ("train.sample_guidance_scale", train.sample_guidance_scale, 1),
        ("train.sample_seed", train.sample_seed, 0),
    ]
    above_zero = [
        ("optim.learning_rate", optim.learning_rate),
        ("optim.adam_epsilon", optim.adam_epsilon),
    ]
    if optim.text_encoder_learning_rate is not None:
        above_zero.append(("optim.text_encoder_learning_rate", optim.text_encoder_learning_rate))
    if isinstance(method, PriorSettings):
        at_least.append(("method.num_class_images", method.num_class_images, 0))
        at_least.append(("method.prior_loss_weight", method.prior_loss_weight, 0))
        at_least.append(("method.class_infer_steps", method.class_infer_steps, 1))
        at_least.append(("method.class_guidance_scale", method.class_guidance_scale, 1))
    if isinstance(method, LoraSettings):
        at_least.append(("method.rank", method.rank, 1))
        above_zero.append(("method.alpha", method.alpha))
    for key, value, low in at_least:
        if not low <= value < float("inf"):
            _refuse(key, f"{value} is impossible; it must be at least {low}")
    for key, value in above_zero:
        if not 0 < value < float("inf"):
            _refuse(key, f"{value} is impossible; it must be above 0")
    for key, value in (("adam_beta1", optim.adam_beta1), ("adam_beta2", optim.adam_beta2)):
        if not 0 <= value < 1:
            _refuse(f"optim.{key}", f"{value} is impossible; it must be at least 0 and below 1")
    if data.resolution % 8:
        _refuse("data.resolution", f"{data.resolution} is not a multiple of 8")
    if isinstance(method, TextualInversionSettings) and not 1 <= method.num_vectors <= 75:
        _refuse("method.num_vectors", f"{method.num_vectors} is impossible; it must be 1 to 75")
    if optim.lr_warmup_steps > train.max_steps:
        _refuse("optim.lr_warmup_steps", "more than train.max_steps; the rate would never be full")


def _check_subject(config: RunConfig, subject: SubjectSettings, where: str) -> None:
    if not NAME.fullmatch(subject.name):
        _refuse(
            f"{where}.name", f"{subject.name!r} is no file name; use letters, digits, dot, dash"
        )
    if not os.path.exists(subject.images):
        _refuse(f"{where}.images", f"{subject.images} does not exist; give a folder of pictures")
    if not subject.token.strip() or subject.token != subject.token.strip():
        _refuse(f"{where}.token", f"{subject.token!r} is no word; give one, such as sks")
    if isinstance(config.method, TextualInversionSettings) and len(subject.token.split()) > 1:
        _refuse(f"{where}.token", f"{subject.token!r} has a blank; a new token is one word")
    several = getattr(config.method, "num_vectors", 1) > 1
    if several and subject.token != subject.token.lower():
        _refuse(
            f"{where}.token",
            f"{subject.token!r} has capitals, with which diffusers reads only the first of several "
            f"vectors; write {subject.token.lower()}",
        )
    if subject.instance_prompt and subject.template:
        _refuse(f"{where}.template", "given beside instance_prompt; remove one of the two")
    _check_prompt_fields(subject, config, where)
    prior = config.prior
    if subject.class_images:
        if prior is None:
            _refuse(
                f"{where}.class_images",
                "prior preservation is off; set method.num_class_images above 0, or remove it"
                if isinstance(config.method, PriorSettings)
                else "textual inversion has no prior preservation; remove it",
            )
        if not os.path.isdir(subject.class_images):
            _refuse(f"{where}.class_images", f"{subject.class_images} is not a folder")


def _check_prompt_fields(subject: SubjectSettings, config: RunConfig, where: str) -> None:
    """Unknown or empty placeholders in a prompt are found before anything is loaded."""
    prompts = [(f"{where}.instance_prompt", subject.instance_prompt)]
    if config.prior is not None:
        prompts.append((f"{where}.class_prompt", subject.class_prompt))
    prompts += [
        (f"train.sample_prompts.{i}", text) for i, text in enumerate(config.train.sample_prompts)
    ]
    for key, text in prompts:
        for name in re.findall(r"\{([^{}]*)\}", text):
            if name not in ("token", "class_name", "caption"):
                _refuse(key, f"{{{name}}} is unknown; use {{token}}, {{class_name}}, {{caption}}")
            if name == "class_name" and not subject.class_name:
                _refuse(f"{where}.class_name", f"empty, but {key} asks for {{class_name}}")
            if name == "caption" and "instance_prompt" not in key:
                _refuse(key, "{caption} belongs to training pictures; write the words out")
    usual = not subject.instance_prompt and not subject.template
    if usual and config.method.name in METHODS_WITH_CLASS_WORD and not subject.class_name:
        _refuse(f"{where}.class_name", "empty; say what kind of thing it is, such as fox")
    teaches = "{token}" in subject.instance_prompt or "[name]" in subject.instance_prompt
    if subject.instance_prompt and not teaches:
        _refuse(f"{where}.instance_prompt", "does not hold {token}, so the word learns nothing")
