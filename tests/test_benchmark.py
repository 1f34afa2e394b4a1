"""The benchmark's own measurements, on functions whose answer is known, and at toy size."""

from __future__ import annotations

import torch

from lml import benchmark


def test_peak_memory_counts_what_lives_at_the_same_time():
    x = torch.randn(1000, 100)
    assert benchmark.peak_memory(lambda: [x.clone(), x.clone()]) == 2 * x.nbytes

    def one_after_the_other():
        for _ in range(3):
            x.clone()

    assert benchmark.peak_memory(one_after_the_other) == x.nbytes


def test_the_correction_keeps_its_promise_of_memory():
    rows = benchmark.correction_memory((256, 3, 32, 32), [1, 2, 4])
    assert len(rows) == 3
    assert all(row.met for row in rows)


def test_correction_time_gives_a_ratio_for_every_rank():
    rows = benchmark.correction_time((2, 3, 8, 8), [1, 2], 3)
    assert len(rows) == 4
    assert all(row.value > 0 for row in rows)
