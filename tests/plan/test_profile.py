"""Layers are timed once in each format, whatever step brings it."""

from __future__ import annotations

from dataclasses import replace

from gossamer.plan.job import Job
from gossamer.plan.profile import profile
from gossamer.runtimes import get_runtime
from gossamer.techniques.quantize.quantize import Quantize


def timings(job: Job) -> int:
    return sum(entry["event"] == "finished" and entry["kind"] == "layer-times" for entry in job.run.journal())


def test_a_format_is_timed_once(job: Job) -> None:
    job = replace(job, runtime=get_runtime("onnxruntime"))
    first = profile(job, [Quantize(bits=8)])
    assert timings(job) == 1
    again = profile(job, [Quantize(bits=8, scale="minmax")], first)  # other codes, the same grid
    assert timings(job) == 1
    assert again.seconds == first.seconds
    assert len(again.effects) == len(first.effects) + 1
    more = profile(job, [Quantize(bits=4, group_size=16)], again)
    assert timings(job) == 2
    assert {one: seconds for one, seconds in more.seconds.items() if one in first.seconds} == first.seconds
    new = [one for one in more.seconds if one not in first.seconds]
    assert new
    assert all(one.weight == "int4 symmetric group 16" for one in new)
    assert all(0 < more.seconds[one] < 1 for one in new)
