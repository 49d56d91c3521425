"""Run by torchrun: what one update sends between processes. Arguments: config, result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from disttrain.config_file import load_config
from disttrain.engine.distributed import Mesh
from disttrain.engine.progress import Progress
from disttrain.engine.run import open_run
from disttrain.engine.train import gradients


def main() -> None:
    config, result = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    sent: list[int] = []

    def count(_, bucket):  # torch refuses annotations that are text
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda done: done.value()[0] / dist.get_world_size())
        )

    with Mesh(config) as mesh, open_run(config, mesh, Progress(mesh.is_main), False) as run:
        pack = run.make_pack(run.queue[0])
        assert isinstance(pack.denoiser, DistributedDataParallel)
        pack.denoiser.register_comm_hook(None, count)
        pack.begin_step()
        pack.update(gradients(run, pack).tolist())
        state = pack.placement.gather().optimizer
        if mesh.is_main:
            kept = sum(value.numel() * value.element_size() for value in state.values())
            result.write_text(json.dumps({"sent": sum(sent), "state": kept}))
        del pack


if __name__ == "__main__":
    main()
