"""The plan of a run in words: what `train --dry-run` prints. Loads no model and writes nothing."""

from __future__ import annotations

import os

from disttrain.config import RunConfig
from disttrain.data.source import open_source, source_options
from disttrain.engine.batch_size import settle_batch
from disttrain.engine.optim import describe_learning_rate
from disttrain.engine.run_folder import RunFolder, check_same_run
from disttrain.prompts import prompt_plan


def print_plan(config: RunConfig) -> None:
    """Print what `train` would do, after the checks that need no model.

    Raises:
        UserError: what `train` would refuse.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = settle_batch(config, world)
    folder = RunFolder(config.folder)
    if folder.config.is_file():
        check_same_run(folder, config)
        done = folder.finished()
        print(f"run folder  {folder.path} (exists; finished: {', '.join(done) or 'nothing yet'})")
    else:
        print(f"run folder  {folder.path} (new)")
    print(f"method      {config.method.name} on {config.base_model}")
    rate = describe_learning_rate(config, world)
    print(f"            {rate['step']}")
    print(f"            {rate['text']}")
    train = config.train
    per_step = config.data.batch_size * train.gradient_accumulation_steps * world
    for subject in config.subjects:
        pictures = len(open_source(subject.images, source_options(config)).records)
        plan = prompt_plan(config, subject)
        epochs = train.max_steps * per_step / pictures
        print(f"subject     {subject.name}: {pictures} pictures, {epochs:.1f} epochs")
        print(f"            {train.max_steps} steps of {per_step} pictures")
        print(f"            prompt: {plan.fill(plan.lines[0], '<caption>')}")
        if len(plan.lines) > 1:
            print(f"            and {len(plan.lines) - 1} more from its template")
    print("nothing was written (dry run)")
