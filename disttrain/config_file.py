"""From a config file and overrides to a checked RunConfig.

Between the YAML a person writes and everything else. Invariant: a `RunConfig` from `load_config`
passed every check that needs neither torch nor the base model; the message of a refusal names the
key, what is wrong and what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disttrain import schema
from disttrain.config import (
    METHODS_WITH_CLASS_WORD,
    FinetuneSettings,
    LoraSettings,
    PriorSettings,
    RunConfig,
    SubjectSettings,
    TextualInversionSettings,
)
from disttrain.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
    _check_data(config)
    check_parallel(config)
    for i, subject in enumerate(config.subjects):
        _check_subject(config, subject, f"subjects.{i}")
        _check_score(config, subject, f"subjects.{i}")
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
    trains_text = getattr(method, "train_text_encoder", False)
    if config.optim.text_encoder_learning_rate is not None and not trains_text:
        _refuse(
            "optim.text_encoder_learning_rate",
            "the text encoder is not trained; set method.train_text_encoder: true or remove it",
        )
    if config.train.sample_every > 0 and not config.train.sample_prompts:
        _refuse("train.sample_prompts", "empty while sample_every asks for previews; add a prompt")


def _check_numbers(config: RunConfig) -> None:
    optim, train, data, captions = config.optim, config.train, config.data, config.captions
    for key, value, low in _lower_bounds(config):
        if not low <= value < float("inf"):
            _refuse(key, f"{value} is impossible; it must be at least {low}")
    for key, value in _above_zero(config):
        if not 0 < value < float("inf"):
            _refuse(key, f"{value} is impossible; it must be above 0")
    shares = [
        ("optim.adam_beta1", optim.adam_beta1),
        ("optim.adam_beta2", optim.adam_beta2),
        ("optim.ema_decay", optim.ema_decay),
        ("data.max_damaged", data.max_damaged or 0.0),
        ("captions.tag_dropout", captions.tag_dropout),
        ("captions.dropout", captions.dropout),
    ]
    for key, value in shares:
        if not 0 <= value < 1:
            _refuse(key, f"{value} is impossible; it must be at least 0 and below 1")
    for key, value in [("resolution", data.resolution), ("bucket_step", data.bucket_step)]:
        if value % 8:
            _refuse(f"data.{key}", f"{value} is not a multiple of 8")
    method = config.method
    if isinstance(method, TextualInversionSettings) and not 1 <= method.num_vectors <= 75:
        _refuse("method.num_vectors", f"{method.num_vectors} is impossible; it must be 1 to 75")
    if optim.lr_warmup_steps > train.max_steps:
        _refuse("optim.lr_warmup_steps", "more than train.max_steps; the rate would never be full")
    if train.early_stop and train.checkpoint_every >= train.max_steps:
        _refuse(
            "train.early_stop",
            f"chooses among checkpoints, and checkpoint_every ({train.checkpoint_every}) leaves "
            f"one in {train.max_steps} steps; lower checkpoint_every",
        )


def _lower_bounds(config: RunConfig) -> list[tuple[str, float, float]]:
    """(key, value, least value) of every number that has one."""
    data, optim, train = config.data, config.optim, config.train
    bounds: list[tuple[str, float, float]] = [
        ("seed", config.seed, 0),
        ("data.resolution", data.resolution, 8),
        ("data.batch_size", data.batch_size, 1),
        ("data.cached_crops", data.cached_crops, 1),
        ("data.bucket_step", data.bucket_step, 8),
        ("data.bucket_max_aspect", data.bucket_max_aspect, 1),
        ("data.num_workers", data.num_workers or 0, 0),
        ("data.shuffle_window", data.shuffle_window, 0),
        ("captions.keep_tags", config.captions.keep_tags, 0),
        ("fleet.lease_seconds", config.fleet.lease_seconds, 5),
        ("optim.lr_warmup_steps", optim.lr_warmup_steps, 0),
        ("optim.max_grad_norm", optim.max_grad_norm, 0),
        ("optim.weight_decay", config.weight_decay, 0),
        ("train.max_steps", train.max_steps, 1),
        ("train.gradient_accumulation_steps", train.gradient_accumulation_steps, 1),
        ("train.checkpoint_every", train.checkpoint_every, 1),
        ("train.keep_checkpoints", train.keep_checkpoints, 1),
        ("train.early_stop_patience", train.early_stop_patience, 1),
        ("train.sample_every", train.sample_every, 0),
        ("train.sample_steps", train.sample_steps, 1),
        ("train.sample_guidance_scale", train.sample_guidance_scale, 1),
        ("train.sample_seed", train.sample_seed, 0),
        ("score.pictures", config.score.pictures, 1),
        ("score.steps", config.score.steps, 1),
        ("score.guidance_scale", config.score.guidance_scale, 1),
        ("score.seed", config.score.seed, 0),
    ]
    if isinstance(config.fleet.pack_size, int):
        bounds.append(("fleet.pack_size", config.fleet.pack_size, 1))
    if data.global_batch_size is not None:
        bounds.append(("data.global_batch_size", data.global_batch_size, 1))
    method = config.method
    if isinstance(method, PriorSettings):
        bounds.append(("method.num_class_images", method.num_class_images, 0))
        bounds.append(("method.prior_loss_weight", method.prior_loss_weight, 0))
        bounds.append(("method.class_infer_steps", method.class_infer_steps, 1))
        bounds.append(("method.class_guidance_scale", method.class_guidance_scale, 1))
    if isinstance(method, LoraSettings):
        bounds.append(("method.rank", method.rank, 1))
    return bounds


def _above_zero(config: RunConfig) -> list[tuple[str, float]]:
    optim = config.optim
    found = [
        ("data.shard_cache_gb", config.data.shard_cache_gb),
        ("optim.learning_rate", optim.learning_rate),
        ("optim.adam_epsilon", optim.adam_epsilon),
    ]
    if optim.text_encoder_learning_rate is not None:
        found.append(("optim.text_encoder_learning_rate", optim.text_encoder_learning_rate))
    if isinstance(config.method, LoraSettings):
        found.append(("method.alpha", config.method.alpha))
    return found


def _check_data(config: RunConfig) -> None:
    """Settings of data and captions that contradict each other."""
    data, captions = config.data, config.captions
    if data.latent_precision != "float32" and not data.cache_latents:
        _refuse("data.latent_precision", "nothing is cached; set cache_latents: true or remove it")
    if data.aspect_ratio_buckets and data.bucket_step > data.resolution:
        _refuse("data.bucket_step", f"above data.resolution ({data.resolution}); lower it")
    try:
        re.compile(captions.filename_pattern)
    except re.error as error:
        _refuse("captions.filename_pattern", f"not a regular expression ({error}); mend it")
    if captions.filename_join != " " and not captions.filename_pattern:
        _refuse("captions.filename_join", "joins the matches of filename_pattern, which is empty")
    if captions.keep_tags and not (captions.shuffle_tags or captions.tag_dropout):
        _refuse("captions.keep_tags", "nothing is shuffled or dropped; remove it")
    if captions.dropout and isinstance(config.method, TextualInversionSettings):
        _refuse("captions.dropout", "without its prompt a new token learns nothing; remove it")


def check_parallel(config: RunConfig) -> None:
    """Refuse ways to split a model that the method or other settings do not allow.

    Raises:
        ConfigError: naming the key.
    """
    parallel, method = config.parallel, config.method.name
    key, strategy = "parallel.strategy", parallel.strategy
    splits = strategy not in ("auto", "ddp")
    if parallel.offload_optimizer and strategy in ("ddp", "fsdp"):
        _refuse("parallel.offload_optimizer", f"not for {strategy}; use {key}: zero2 or zero3")
    if parallel.deepspeed_config and strategy in ("ddp", "fsdp"):
        _refuse("parallel.deepspeed_config", f"not for {strategy}; use {key}: zero2 or zero3")
    if splits and config.mixed_precision == "fp16":
        _refuse("mixed_precision", f"fp16 is not for {strategy}; use bf16, or {key}: ddp")
    if splits and strategy != "fsdp" and config.optim.ema_decay:
        _refuse("optim.ema_decay", f"not with {strategy}; use {key}: fsdp or ddp, or remove it")
    if parallel.force and not (config.packable and strategy == "fsdp"):
        _refuse("parallel.force", "forces fsdp on lora and textual_inversion; remove it")
    if config.packable and splits and not parallel.force:
        _refuse(
            key,
            f"{strategy} splits a model that trains whole; {method} trains a few MB, so ddp is "
            "faster (or disttrain fleet: other subjects on each GPU); remove it"
            + (", or set parallel.force: true" if strategy == "fsdp" else ""),
        )
    if parallel.force and config.train.sample_prompts:
        _refuse("train.sample_prompts", "no previews while the base is split (parallel.force)")
    if parallel.force and config.train.early_stop:
        _refuse("train.early_stop", "draws, which a split base cannot (parallel.force); remove one")


def _check_subject(config: RunConfig, subject: SubjectSettings, where: str) -> None:
    if not NAME.fullmatch(subject.name):
        _refuse(
            f"{where}.name", f"{subject.name!r} is no file name; use letters, digits, dot, dash"
        )
    if not _may_exist(subject.images):
        _refuse(f"{where}.images", f"{subject.images} does not exist; give a folder of pictures")
    finetune = isinstance(config.method, FinetuneSettings)
    if subject.token != subject.token.strip() or not (subject.token or finetune):
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
                else f"{config.method.name} has no prior preservation; remove it",
            )
        if not _may_exist(subject.class_images):
            _refuse(f"{where}.class_images", f"{subject.class_images} does not exist")


def _check_score(config: RunConfig, subject: SubjectSettings, where: str) -> None:
    """Settings of `disttrain score` that could not be followed later."""
    score = config.score
    if not score.features.strip():
        _refuse("score.features", "empty; use effnet, or a folder or hub id of CLIP or DINO")
    is_path = score.features.startswith(("/", ".", "~"))
    if is_path and not os.path.isdir(os.path.expanduser(score.features)):
        _refuse("score.features", f"{score.features} does not exist; give a model's folder")
    key = f"{where}.held_out"
    if subject.held_out:
        if not _may_exist(subject.held_out):
            _refuse(key, f"{subject.held_out} does not exist; give a folder of pictures")
        if os.path.normpath(subject.held_out) == os.path.normpath(subject.images):
            _refuse(key, "the training pictures themselves; keep some out, or remove it")
    for i, text in enumerate(score.sanity_prompts):
        own = subject.token.lower()
        inverted = isinstance(config.method, TextualInversionSettings)
        words = text.lower() if inverted else text.lower().split()
        if "{token}" in text or (own and own in words):
            _refuse(
                f"score.sanity_prompts.{i}",
                "holds the subject's token; these pictures must be able to do without it",
            )


def _may_exist(place: str) -> bool:
    """Whether pictures may be there; URLs are looked at when the run opens."""
    return "://" in place or os.path.exists(place)


def _check_prompt_fields(subject: SubjectSettings, config: RunConfig, where: str) -> None:
    """Unknown or empty placeholders in a prompt are found before anything is loaded."""
    prompts = [(f"{where}.instance_prompt", subject.instance_prompt)]
    if config.prior is not None:
        prompts.append((f"{where}.class_prompt", subject.class_prompt))
    prompts += [
        (f"train.sample_prompts.{i}", text) for i, text in enumerate(config.train.sample_prompts)
    ]
    prompts += [(f"score.prompts.{i}", text) for i, text in enumerate(config.score.prompts)]
    prompts += [
        (f"score.sanity_prompts.{i}", text) for i, text in enumerate(config.score.sanity_prompts)
    ]
    for key, text in prompts:
        for name in re.findall(r"\{([^{}]*)\}", text):
            if name not in ("token", "class_name", "caption"):
                _refuse(key, f"{{{name}}} is unknown; use {{token}}, {{class_name}}, {{caption}}")
            if name == "class_name" and not subject.class_name:
                _refuse(f"{where}.class_name", f"empty, but {key} asks for {{class_name}}")
            if name == "token" and not subject.token:
                _refuse(f"{where}.token", f"empty, but {key} asks for {{token}}")
            if name == "caption" and "instance_prompt" not in key:
                _refuse(key, "{caption} belongs to training pictures; write the words out")
    usual = not subject.instance_prompt and not subject.template
    if usual and config.method.name in METHODS_WITH_CLASS_WORD and not subject.class_name:
        _refuse(f"{where}.class_name", "empty; say what kind of thing it is, such as fox")
    teaches = "{token}" in subject.instance_prompt or "[name]" in subject.instance_prompt
    if subject.instance_prompt and not (teaches or isinstance(config.method, FinetuneSettings)):
        _refuse(f"{where}.instance_prompt", "does not hold {token}, so the word learns nothing")
