"""A codec for each direction, and the combiners that it suits."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorspark.errors import ConfigError
from tensorspark.weights.averaging import MeanDeltaCombiner
from tensorspark.weights.codecs import codec_of
from tensorspark.weights.combiners import (
    DeltaWeightCombiner,
    MeanWeightCombiner,
    UpdateMeanWeightCombiner,
    WeightCombiner,
)
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.elastic import ElasticAveragingCombiner
from tensorspark.weights.server_optimizers import ServerAdam

DENSE = ["float16", "bfloat16", "int8"]
SPARSE = ["topk:0.01", "rows"]


class OwnCombiner(WeightCombiner):
    """Takes whole weights, as it does not say otherwise."""

    def compute(
        self, origin_weight: NDArray[Any], new_weight: NDArray[Any], worker_id: int | str = -1, name: str | None = None
    ) -> NDArray[Any]:
        return np.asarray(np.maximum(origin_weight, new_weight))


def test_nothing_is_encoded_unless_it_is_asked_for() -> None:
    assert Compression() == NO_COMPRESSION
    assert (NO_COMPRESSION.push_codec, NO_COMPRESSION.pull_codec, NO_COMPRESSION.pulls_rows) == (None, None, False)


@pytest.mark.parametrize("spec", [*DENSE, *SPARSE])
def test_a_push_can_be_encoded_by_every_codec(spec: str) -> None:
    compression = Compression(push=spec)
    assert compression.push_codec == codec_of(spec)
    assert compression.pull_codec is None
    assert not compression.pulls_rows


@pytest.mark.parametrize("spec", DENSE)
def test_a_pull_can_be_encoded_by_every_codec_that_sends_all(spec: str) -> None:
    compression = Compression(pull=spec)
    assert compression.pull_codec == codec_of(spec)
    assert compression.push_codec is None


def test_rows_are_a_patch_for_pulls_and_a_codec_for_pushes() -> None:
    compression = Compression("rows", "rows")
    assert compression.push_codec == codec_of("rows")
    assert compression.pull_codec is None
    assert compression.pulls_rows


def test_specs_are_kept_in_their_canonical_form_and_travel() -> None:
    compression = Compression("topk:1e-2", "int8")
    assert (compression.push, compression.pull) == ("topk:0.01", "int8")
    assert compression == Compression("topk:0.010", "int8")
    assert pickle.loads(pickle.dumps(compression)) == compression


@pytest.mark.parametrize("spec", ["topk:0.1", "topk:1e-3"])
def test_top_k_is_refused_for_pulls_by_the_settings_names(spec: str) -> None:
    with pytest.raises(ConfigError, match=rf"pull_compression='{spec}' .* use none, float16, bfloat16, int8 or rows"):
        Compression(pull=spec)


@pytest.mark.parametrize("spec", ["gzip", "topk", "topk:2", "int8:3", "", "None"])
def test_what_is_no_codec_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        Compression(push=spec)
    with pytest.raises(ConfigError):
        Compression(pull=spec)


@pytest.mark.parametrize("spec", ["none", *DENSE, *SPARSE])
@pytest.mark.parametrize("combiner", [DeltaWeightCombiner(), MeanDeltaCombiner(), ServerAdam(0.1)])
def test_deltas_can_be_sent_by_every_codec(spec: str, combiner: WeightCombiner) -> None:
    Compression(spec, "int8").require_fit(combiner)


@pytest.mark.parametrize("spec", ["none", *DENSE])
@pytest.mark.parametrize(
    "combiner", [MeanWeightCombiner(2), UpdateMeanWeightCombiner(), ElasticAveragingCombiner(0.1), OwnCombiner()]
)
def test_what_is_no_delta_can_be_sent_by_codecs_that_send_all(spec: str, combiner: WeightCombiner) -> None:
    Compression(spec, "rows").require_fit(combiner)


@pytest.mark.parametrize("spec", SPARSE)
@pytest.mark.parametrize(
    ("combiner", "what"),
    [
        (MeanWeightCombiner(2), "MeanWeightCombiner takes whole weights"),
        (OwnCombiner(), "OwnCombiner takes whole weights"),
        (ElasticAveragingCombiner(0.1), "ElasticAveragingCombiner takes differences that are never zero"),
    ],
)
def test_what_is_no_delta_cannot_be_sent_in_part(spec: str, combiner: WeightCombiner, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"compression='{spec}' .*{what}: use float16"):
        Compression(spec).require_fit(combiner)
