"""Predictions against sums done by hand from the tables of conftest.py."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, sqrt

import pytest

from gossamer.plan.predict import Corrections, Tables, as_figures, cut_key, predict
from gossamer.techniques.distill.distill import Distill
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.quantize import Quantize

INT8, INT4, INT2, ROWS = (
    Quantize(bits=8), Quantize(bits=4, group_size=16), Quantize(bits=2), Quantize(targets=("embedding",))
)  # fmt: skip


def test_nothing_done_predicts_the_unchanged_model(tables: Tables) -> None:
    found = predict(tables, [])
    assert (found.size_bytes, found.latency_seconds, found.latency_share) == (20_000, 1.0, 0.5)
    assert (found.memory_bytes, found.kl, found.seconds) == (300_000, 0.0, 7.5)


def test_bytes_are_counted_layer_by_layer(tables: Tables) -> None:
    # packed int32 words of codes, the shape as two int64, one float16 scale a row
    up, down = 32 * 4 * 4 + 16 + 32 * 2, 16 * 8 * 4 + 16 + 16 * 2
    assert predict(tables, [INT8]).size_bytes == 20_000 - (2048 - up) - (2048 - down)
    # 4 bits: half the words; `down` has two groups of 16
    up, down = 32 * 2 * 4 + 16 + 32 * 2, 16 * 4 * 4 + 16 + 16 * 2 * 2
    assert predict(tables, [INT4]).size_bytes == 20_000 - (2048 - up) - (2048 - down)


def test_a_tied_weight_is_counted_once(tables: Tables) -> None:
    embedding = 100 * 16 + 100 * 2  # codes as int8, one float16 scale a row; the head shares them
    assert predict(tables, [ROWS]).size_bytes == 20_000 - (6400 - embedding)


def test_a_cast_halves_what_has_no_codes(tables: Tables) -> None:
    assert predict(tables, [Cast()]).size_bytes == 20_000 - (6400 + 2048 + 2048 + 64) // 2
    up, down = 32 * 4 * 4 + 16 + 32 * 2, 16 * 8 * 4 + 16 + 16 * 2
    assert predict(tables, [INT8, Cast()]).size_bytes == 20_000 - 3200 - 32 - (2048 - up) - (2048 - down)


def test_seconds_add_up_layer_by_layer(tables: Tables) -> None:
    assert predict(tables, [INT8]).latency_seconds == pytest.approx(1.0 + (0.20 - 0.30) + (0.10 - 0.25))
    assert predict(tables, [INT4]).latency_seconds == pytest.approx(1.0 + (0.28 - 0.30) + (0.15 - 0.25))
    assert predict(tables, [INT8]).latency_share == pytest.approx(0.75 / 2.0)
    assert predict(tables, [ROWS]).latency_seconds == 1.0  # an embedding's time is not in the table
    quick = replace(tables, profile=replace(tables.profile, seconds=dict.fromkeys(tables.profile.seconds, 9.0)))
    assert predict(quick, [INT8]).latency_seconds == 1.0


def test_no_sum_of_layers_makes_a_model_free(tables: Tables) -> None:
    formats = {found: 10.0 if found.weight == "float32" else 0.0 for found in tables.profile.seconds}
    free = replace(tables, profile=replace(tables.profile, seconds=formats))
    assert predict(free, [INT8]).latency_seconds == pytest.approx(0.05)


def test_divergences_add_and_the_smaller_bound_on_accuracy_counts(tables: Tables) -> None:
    both = predict(tables, [INT8, ROWS])
    assert both.kl == pytest.approx(0.0011)
    assert both.quality_share == pytest.approx(1 - 0.004)  # answers that change: 0.4 % and none
    pinsker = predict(tables, [INT4])
    assert sqrt(0.02 / 2) > 1 - 0.96  # so the share of changed answers is the smaller here too
    assert pinsker.quality_share == pytest.approx(0.96)
    unseen = predict(tables, [Cast()])  # no answer of the calibration rows changed: Pinsker's bound is what is left
    assert unseen.quality_share == pytest.approx(1 - sqrt(0.0002 / 2))


def test_a_likelihood_loses_the_exponential_of_the_divergence(tables: Tables) -> None:
    speaking = replace(tables, likelihood_metric=True)
    assert predict(speaking, [INT4]).quality_share == pytest.approx(exp(-0.02))


def test_memory_follows_the_bytes(tables: Tables) -> None:
    found = predict(tables, [INT4])
    assert 300_000 - found.memory_bytes == 20_000 - found.size_bytes


def test_what_was_measured_corrects_the_next_prediction_of_its_kind(tables: Tables) -> None:
    corrections = Corrections()
    before = predict(tables, [INT8])
    corrections.learn("8", before, latency_share=2 * before.latency_share, quality_share=1 - 4 * 0.004)
    after = predict(tables, [INT8], corrections)
    assert after.latency_seconds == pytest.approx(2 * before.latency_seconds)
    untried = predict(tables, [INT4])  # a kind that was not measured yet starts from the mean of those that were
    assert predict(tables, [INT4], corrections).latency_seconds == pytest.approx(2 * untried.latency_seconds)
    measured = Corrections(latency={"4": 0.0, "8": log(2)})
    assert predict(tables, [INT4], measured).latency_seconds == untried.latency_seconds
    # half of the surprise, in logarithms, carries over to every recipe's quality
    assert 1 - after.quality_share == pytest.approx(0.004 * sqrt(4))
    assert 1 - predict(tables, [INT4], corrections).quality_share == pytest.approx(0.04 * sqrt(4))
    corrections.learn("8", after, latency_share=after.latency_share, quality_share=after.quality_share)
    assert corrections.latency["8"] == pytest.approx(log(2))  # a right prediction changes nothing


def test_bytes_that_files_take_beside_their_parameters_are_learned(tables: Tables) -> None:
    corrections = Corrections()
    before = predict(tables, [INT8])
    corrections.learn("8", before, latency_share=None, quality_share=0.996, size_bytes=before.size_bytes + 700)
    assert predict(tables, [INT8], corrections).size_bytes == before.size_bytes + 700
    assert predict(tables, [INT4], corrections).size_bytes == predict(tables, [INT4]).size_bytes + 700
    again = predict(tables, [INT8], corrections)
    corrections.learn("8", again, latency_share=None, quality_share=0.996, size_bytes=again.size_bytes - 200)
    assert predict(tables, [INT8], corrections).size_bytes == before.size_bytes + 500


def test_what_cuts_and_trains_as_a_measured_recipe_loses_what_that_one_lost(tables: Tables) -> None:
    learned = Distill()
    corrections = Corrections()
    before = predict(tables, [learned, INT8])
    assert before.quality_share > 0.95
    corrections.learn("8", before, latency_share=None, quality_share=0.9, cuts=cut_key([learned, INT8]))
    assert predict(tables, [learned, INT8], corrections).quality_share == pytest.approx(0.9)
    assert predict(tables, [learned, INT4], corrections).quality_share < 0.95  # the same but for rounding
    half = sqrt(0.1 / (1 - before.quality_share))
    assert 1 - predict(tables, [INT4], corrections).quality_share == pytest.approx(0.04 * half)


def test_figures_carry_the_names_that_goals_use(tables: Tables) -> None:
    found = predict(tables, [INT8])
    figures = as_figures(found, tables.original)
    assert figures["latency p50 ratio"] * tables.original.latency.p50 == pytest.approx(figures["latency p50"])
    assert (figures["params"], figures["flops"], figures["size"]) == (2640, 2048, found.size_bytes)
    assert figures["throughput"] == pytest.approx(1 / 0.75)
