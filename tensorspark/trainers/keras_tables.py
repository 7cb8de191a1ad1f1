"""What preprocessing layers learned from `adapt`: vocabularies and moments, which a model's config does not hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorspark.errors import ModelError
from tensorspark.trainers.startup import importing

with importing():
    import keras

_LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)


def is_built(model: keras.Model) -> bool:
    """Whether the model's weights are there. Lookups have none, and never call themselves built."""
    return all(layer.built or _is_lookup(layer) for layer in model._flatten_layers())


def has_lookups(model: keras.Model) -> bool:
    return any(_is_lookup(layer) for layer in model._flatten_layers())


def _is_lookup(layer: Any) -> bool:
    return isinstance(layer, (*_LOOKUPS, keras.layers.TextVectorization))


def tables_of(model: keras.Model) -> dict[int, Any]:
    """What layers were adapted to, by their place in the model.

    Raises:
        ModelError: a layer that weighs its words, whose weights do not travel.
    """
    tables: dict[int, Any] = {}
    for index, layer in enumerate(model._flatten_layers()):
        if isinstance(layer, _LOOKUPS) and layer.input_vocabulary is None and _is_adapted(layer):
            if layer.output_mode == "tf_idf":
                raise ModelError(
                    f"layer {layer.name} was adapted in output mode tf_idf, which does not travel to the executors: "
                    f"give its constructor vocabulary and idf_weights"
                )
            tables[index] = layer.get_vocabulary(include_special_tokens=False)
        elif isinstance(layer, keras.layers.Normalization) and layer.input_mean is None and layer.built:
            tables[index] = [np.asarray(layer.adapt_mean), np.asarray(layer.adapt_variance)]
    return tables


def set_tables(model: keras.Model, tables: dict[int, Any]) -> None:
    """Gives the same layers of the same model, made again, what they were adapted to."""
    layers = model._flatten_layers()
    for index, table in tables.items():
        layer = layers[index]
        if not isinstance(layer, keras.layers.Normalization):
            layer.set_vocabulary(table)
        elif layer.built:
            layer.adapt_mean.assign(table[0])
            layer.adapt_variance.assign(table[1])
            layer.finalize_state()
        else:
            layer.input_mean, layer.input_variance = table


def _is_adapted(layer: Any) -> bool:
    num_special = int(layer.num_oov_indices) + (layer.mask_token is not None)
    return bool(layer.vocabulary_size() > num_special)
