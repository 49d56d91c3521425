"""Digests of settings: what a pack shares, what a result depends on, what may go on.

Between settings and packs. Invariant: subjects with one pack key give the same results in one pack
as alone; a checkpoint goes on only under the training key it was written with.
"""

from __future__ import annotations

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.engine.run_folder import MAY_CHANGE
from disttrain.files import digest_of

PER_SUBJECT = (
    "subjects",
    "seed",
    "captions",
    "score.",
    "method.init_text",
    "method.prior_loss_weight",
    "optim.learning_rate",
    "optim.text_encoder_learning_rate",
    "optim.lr_schedule",
    "optim.lr_warmup_steps",
    "optim.max_grad_norm",
    "optim.weight_decay",
    "train.max_steps",
    "data.center_crop",
    "data.cached_crops",
    "data.random_flip",
    "data.epoch_end",
    "data.shuffle_window",
    "data.max_damaged",
)
"""Settings that subjects of one pack may have each for itself."""


SCORED_AGAINST = "subjects.0.held_out"
"""Pictures that nothing is taught from."""


def pack_key(member: RunConfig) -> str:
    """Equal for subjects that may train in one pack."""
    flat = schema.flatten(schema.to_mapping(member))
    return digest_of({k: v for k, v in flat.items() if not k.startswith(PER_SUBJECT)})


DECIDES_THE_END = ("train.early_stop", "train.checkpoint_every", "score.", SCORED_AGAINST)
"""Settings that a result depends on where scores choose it."""


def settings_key(member: RunConfig) -> str:
    """Digest of what a subject's result depends on."""
    flat = schema.flatten(schema.to_mapping(member))
    other = (*MAY_CHANGE, SCORED_AGAINST)
    counts = ("train.max_steps", *(DECIDES_THE_END if member.train.early_stop else ()))
    kept = {k: v for k, v in flat.items() if not k.startswith(other) or k.startswith(counts)}
    return digest_of(kept)


def training_key(member: RunConfig) -> str:
    """Equal for settings with which a subject that was begun may go on.

    Where its pictures lie does not count: their digest is kept beside it.
    """
    flat = schema.flatten(schema.to_mapping(member))
    places = ("subjects.0.images", "subjects.0.class_images", SCORED_AGAINST)
    return digest_of({k: v for k, v in flat.items() if not k.startswith((*MAY_CHANGE, *places))})
