"""The number of threads: measured in turn, torch left as it was, few preferred over nearly as fast many."""

import torch

from scalerec.inference.threads import best_threads, measure_threads


def test_every_number_is_measured_and_torch_left_alone():
    before, seen = torch.get_num_threads(), []
    found = measure_threads(lambda: seen.append(torch.get_num_threads()), seconds=0, most=6)
    assert list(found) == [1, 2, 4, 6] and seen[:4] == [1, 2, 4, 6] and len(seen) == 12
    assert torch.get_num_threads() == before


def test_few_threads_nearly_as_fast_win():
    assert best_threads({1: 10.4, 2: 10.0, 4: 12.0}, 4) == 1
    assert best_threads({1: 20.0, 2: 11.0, 4: 10.5}, 8) == 2


def test_the_last_core_is_the_event_loops_unless_the_model_is_large():
    assert best_threads({1: 2.0, 2: 1.5}, 2) == 1 and best_threads({1: 2.0, 2: 1.5}, 4) == 2
    assert best_threads({1: 400.0, 2: 220.0}, 2) == 2
    assert best_threads({1: 2.0}, 1) == 1
