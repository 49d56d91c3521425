"""The loop: load, batch, loss, step, log, save, stop. Here the pipeline's parts meet.

Invariant: every rank takes every branch alike; what only rank zero does holds no collective.
"""

from __future__ import annotations

import time

import torch

from disttrain.config import RunConfig
from disttrain.engine.distributed import Mesh
from disttrain.engine.launcher_settings import settle_parallel
from disttrain.engine.pack import Pack
from disttrain.engine.preemption import StopRequest
from disttrain.engine.preflight import preflight
from disttrain.engine.progress import Progress
from disttrain.engine.recorder import Recorder
from disttrain.engine.run import Run, open_run
from disttrain.engine.work import Work
from disttrain.errors import Interrupted


def train(config: RunConfig, fresh: bool = False) -> None:
    """Run a config to its end, going on from its newest checkpoint if there is one.

    Raises:
        UserError: something the person in front can mend; `Interrupted` after a signal.
    """
    config = settle_parallel(config)
    with Mesh(config) as mesh:
        progress = Progress(mesh.is_main)
        preflight(config, mesh, progress, "train", fresh)
        with open_run(config, mesh, progress, fresh) as run:
            for names in run.queue:
                train_subjects(run, names)
                mesh.release()
            run.report()


def train_subjects(run: Run, names: list[str]) -> None:
    """Some subjects of the queue, from their pictures or checkpoints to their results."""
    pack = run.make_pack(names)
    with pack.feeding():
        train_pack(run, pack)


def train_pack(run: Work, pack: Pack) -> None:
    """Take every subject of a pack to its steps, leaving checkpoints and previews on the way."""
    mesh = run.mesh
    with StopRequest() as stop, Recorder(run, pack) as recorder:
        run.end_those_done(pack)
        while pack.active:
            started = time.perf_counter()
            pack.begin_step()
            *means, stopping = mesh.mean(stop.beside(gradients(run, pack))).tolist()
            outcome = pack.update(means)
            recorder.record(means, outcome, time.perf_counter() - started)
            run.end_those_failed(pack, outcome.failed)
            if stopping:
                run.save(pack, pack.active)
                raise Interrupted(f"{run.place_of(pack)}; the same command goes on there")
            run.leave_marks(pack)
            run.end_those_done(pack)


def gradients(run: Work, pack: Pack) -> torch.Tensor:
    """Add up the gradients of one update; returns the losses `[S]` of this rank, without graph.

    Nothing of the graph outlives this: the next update may have other subjects.
    """
    accumulation = run.config.train.gradient_accumulation_steps
    losses = torch.zeros(len(pack.slots), device=run.mesh.device)
    for micro in range(accumulation):
        with pack.placement.accumulate(last=micro == accumulation - 1):
            micro_losses = pack.losses(micro)
            pack.placement.backward(micro_losses.sum())
        losses += micro_losses.detach() / accumulation
    return losses
