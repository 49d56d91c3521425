"""Which placement a run's strategy is, from `ddp` to `fsdp`.

Between the pack and the placements. Invariant: a placement's libraries are imported only by the
runs that use it.
"""

from __future__ import annotations

from disttrain.config import RunConfig
from disttrain.engine.distributed import Mesh
from disttrain.engine.placement import Placement
from disttrain.engine.replicated import Replicated
from disttrain.methods.base import Method
from disttrain.models.parts import BaseModel


def place_weights(config: RunConfig, mesh: Mesh, base: BaseModel, method: Method) -> Placement:
    """The configured placement of what a method trains, ready for the first step."""
    if mesh.strategy == "ddp":
        return Replicated(config, mesh, base, method)
    if mesh.strategy == "fsdp":
        from disttrain.engine.fully_sharded import FullySharded, ShardedBase

        kind = ShardedBase if config.packable else FullySharded
        return kind(config, mesh, base, method)
    from disttrain.engine.zero import DeepSpeedZero

    return DeepSpeedZero(config, mesh, base, method)
