"""The loop: load, batch, loss, step, log, save, stop. Here the pipeline's parts meet.

Invariant: every rank takes every branch alike; what only rank zero does holds no collective.
"""

from __future__ import annotations

import time

import torch

from disttrain.config import RunConfig
from disttrain.engine.distributed import Mesh
from disttrain.engine.pack import Pack
from disttrain.engine.preemption import StopRequest
from disttrain.engine.progress import Progress
from disttrain.engine.recorder import Recorder
from disttrain.engine.run import Run, open_run
from disttrain.errors import Interrupted


def train(config: RunConfig, fresh: bool = False) -> None:
    """Run a config to its end, going on from its newest checkpoint if there is one.

    Raises:
        UserError: something the person in front can mend; `Interrupted` after a signal.
    """
    with Mesh(config) as mesh, open_run(config, mesh, Progress(mesh.is_main), fresh) as run:
        for names in run.queue:
            train_subjects(run, names)
            mesh.release()
        run.report()


def train_subjects(run: Run, names: list[str]) -> None:
    """One pack of the queue, from its pictures or its checkpoint to its results."""
    pack = run.make_pack(names)
    with pack.feeding():
        train_pack(run, pack)
    run.finish(pack)


def train_pack(run: Run, pack: Pack) -> None:
    """Take a pack to `max_steps`, leaving checkpoints and previews on the way."""
    mesh, settings = run.mesh, run.config.train
    with StopRequest() as stop, Recorder(run, pack) as recorder:
        while pack.step < settings.max_steps:
            started = time.perf_counter()
            pack.begin_step()
            losses = torch.zeros(len(pack.subjects), device=mesh.device)
            for micro in range(settings.gradient_accumulation_steps):
                with mesh.accumulate(pack.denoiser):
                    micro_losses = pack.losses(micro)
                    mesh.backward(micro_losses.sum())
                losses += micro_losses.detach() / settings.gradient_accumulation_steps
            *means, stopping = mesh.mean(stop.beside(losses)).tolist()
            norms = pack.update(means)
            recorder.record(means, norms, time.perf_counter() - started)
            if stopping:
                run.save(pack)
                raise Interrupted(f"stopped at step {pack.step}; the same command goes on there")
            if pack.step % settings.checkpoint_every == 0:
                run.save(pack)
            if settings.sample_every and pack.step % settings.sample_every == 0:
                run.preview(pack)
