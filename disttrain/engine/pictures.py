"""A subject's pictures and prompts, opened and checked before anything is written.

Between `data/` and the streams of a pack. Invariant: `open_subject` finds everything that can be
wrong with a subject's files without reading every picture of a large set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from disttrain.config import RunConfig, SubjectSettings
from disttrain.data.bucket_order import BucketOrder
from disttrain.data.buckets import Size, assign, bucket_sizes
from disttrain.data.order import LARGE_SET, Order, SampleOrder
from disttrain.data.source import Source, allowance, open_source, source_options
from disttrain.engine.class_images import given_class_images
from disttrain.engine.compared_pictures import compared_pictures
from disttrain.engine.progress import Progress, join_names
from disttrain.engine.score_prompts import score_prompts
from disttrain.prompts import PromptPlan, prompt_plan, words_of_stem

LOOKED_AT = 1000  # records; a set of millions is not read to say that its captions are not used


@dataclass(frozen=True)
class SubjectData:
    """What a subject is taught from."""

    config: RunConfig
    settings: SubjectSettings
    source: Source
    given_class: Source | None
    plan: PromptPlan
    sizes: list[Size]
    """Heights and widths of its pictures by bucket; buckets without a picture are left out."""
    buckets: np.ndarray | None
    """Bucket of each picture; None when all have one size."""

    def caption(self, picture: int) -> str:
        """The words of a picture: its caption, else those of its file name."""
        record = self.source.records[picture]
        if record.caption is not None:
            return record.caption
        return words_of_stem(record.stem, self.config.captions)

    def order(self, step_size: int) -> Order:
        """The order of its pictures.

        Args:
            step_size: pictures of one optimizer step over all processes.
        """
        data = self.config.data
        count = len(self.source.records)
        drop = drops_tail(self.config, count)
        order = SampleOrder(
            self.source.sizes,
            self.config.seed,
            self.settings.name,
            "instance",
            data.shuffle_window or None,
            step_size if drop and self.buckets is None else 1,
        )
        return order if self.buckets is None else BucketOrder(order, self.buckets, step_size, drop)


def drops_tail(config: RunConfig, count: int) -> bool:
    """Whether an epoch leaves out what does not fill its last step."""
    policy = config.data.epoch_end
    return policy == "drop" or (policy == "auto" and count >= LARGE_SET)


def open_subject(config: RunConfig, progress: Progress) -> SubjectData:
    """The pictures and prompts of a config's only subject, checked; its batch is settled.

    Raises:
        DataError: a picture, caption or template is missing or unusable.
        ConfigError: it is to be scored and there is no prompt for that.
    """
    (subject,) = config.subjects
    source = open_source(subject.images, source_options(config))
    plan = prompt_plan(config, subject)
    given = given_class_images(config, subject)
    sizes, buckets = _buckets(config, source)
    data = SubjectData(config, subject, source, given, plan, sizes, buckets)
    if config.train.early_stop:
        _check_scoring(config, progress)
    if source.ignored:
        progress.warn(f"{subject.images}: not pictures, left out: {join_names(source.ignored)}")
    for line in source.damaged:
        progress.warn(f"passed over: {line}")
    captions = any(record.caption is not None for record in source.records[:LOOKED_AT])
    if captions and not plan.uses_captions:
        progress.hint(
            f"subject {subject.name}: captions are not used; "
            "put {caption} into instance_prompt, or choose a template with [filewords]"
        )
    _say_how_epochs_end(data, progress)
    return data


def _check_scoring(config: RunConfig, progress: Progress) -> None:
    (subject,) = config.subjects
    score_prompts(config, subject)
    compared_pictures(config)
    if not subject.held_out:
        progress.warn(
            f"subject {subject.name}: train.early_stop without held_out compares with the training "
            "pictures, which rewards copying them"
        )


def allowed_damage(config: RunConfig, source: Source) -> int:
    """How many pictures of a source may turn out to be damaged."""
    return allowance(len(source.records), config.data.max_damaged)


def _buckets(config: RunConfig, source: Source) -> tuple[list[Size], np.ndarray | None]:
    data = config.data
    if not data.aspect_ratio_buckets:
        return [(data.resolution, data.resolution)], None
    sizes = bucket_sizes(data.resolution, data.bucket_step, data.bucket_max_aspect)
    used, buckets = np.unique(assign(source.shapes(), sizes), return_inverse=True)
    return [sizes[number] for number in used], buckets.astype(np.int32)


def _say_how_epochs_end(data: SubjectData, progress: Progress) -> None:
    name, count = data.settings.name, len(data.source.records)
    step_size = data.config.data.global_batch_size
    assert step_size is not None, "settle_batch fills it"
    order = data.order(step_size)
    if isinstance(order, BucketOrder):
        pictures = zip(data.sizes, order.counts.tolist(), strict=True)
        listed = ", ".join(f"{width}x{height}: {n}" for (height, width), n in pictures)
        if progress.details:
            progress.say(f"subject {name}: pictures by size {listed}")
        if order.repeated:
            progress.hint(
                f"subject {name}: {order.repeated} of {order.length} places of an epoch repeat a "
                "picture, to fill the last step of each size"
            )
    elif order.length < count:
        progress.hint(
            f"subject {name}: each epoch leaves out {count - order.length} of {count} pictures, "
            "other ones each time (data.epoch_end)"
        )
    elif count % step_size:
        progress.hint(
            f"subject {name}: {count} pictures do not divide by the {step_size} of an optimizer "
            "step; a step may hold pictures of two epochs"
        )
