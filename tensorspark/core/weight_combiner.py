"""The combiners, under the original's name."""

from tensorspark.weights.combiners import (
    DeltaWeightCombiner,
    MeanWeightCombiner,
    UpdateMeanWeightCombiner,
    WeightCombiner,
)

__all__ = ["DeltaWeightCombiner", "MeanWeightCombiner", "UpdateMeanWeightCombiner", "WeightCombiner"]
