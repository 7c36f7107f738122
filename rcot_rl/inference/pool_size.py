"""Number of engines and segmenters that predict, and their shares of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from rcot_rl.recipe.schema import Recipe


@dataclass(frozen=True)
class PoolSize:
    """Processes of the pool and their shares of GPUs."""

    engines: int
    segmenters: int
    engine_gpus: float
    segmenter_gpus: float

    @property
    def gpus(self) -> float:
        """GPUs of the whole pool."""
        return self.engines * self.engine_gpus + self.segmenters * self.segmenter_gpus


def pool_size(recipe: Recipe) -> PoolSize:
    """Return the pool of a recipe."""
    predict = recipe.predict
    if recipe.device == "cpu":
        engines = predict.engines or 1
        return PoolSize(engines, predict.segmenters or engines, 0, 0)
    parallel = recipe.engine.tensor_parallel_size
    share = predict.engine_gpus or (float(parallel) if parallel > 1 else 0.75)
    gpus = recipe.cluster.nodes * recipe.cluster.gpus_per_node
    if predict.engines is not None:
        engines = predict.engines
    elif predict.segmenters is not None:
        engines = int((gpus - predict.segmenters * predict.segmenter_gpus) / share)
    else:
        engines = int(gpus / (share + predict.segmenter_gpus))
    engines = max(1, engines)
    return PoolSize(engines, predict.segmenters or engines, share, predict.segmenter_gpus)
