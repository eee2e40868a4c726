import numpy as np
import pytest
import torch

from madad._runtime.random import derived_seed, generator_from, isolated_seed, spawn_seeds


def test_seeds_of_an_integer_are_always_the_same_and_differ():
    seeds = spawn_seeds(3, 20)
    assert seeds == spawn_seeds(3, 20)
    assert seeds != spawn_seeds(4, 20)
    assert len(set(seeds)) == 20
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    assert seeds[:4] == spawn_seeds(3, 4)


def test_seeds_of_a_random_state_advance_it():
    state = np.random.RandomState(3)
    first, second = spawn_seeds(state, 4), spawn_seeds(state, 4)
    assert first == spawn_seeds(np.random.RandomState(3), 4) == spawn_seeds(3, 4)
    assert first != second


def test_seeds_of_none_come_from_numpys_global_generator_as_in_scikit_learn():
    before = np.random.get_state()  # noqa: NPY002
    first, second = spawn_seeds(None, 4), spawn_seeds(None, 4)
    np.random.set_state(before)  # noqa: NPY002
    assert first != second


def test_a_wrong_random_state_is_refused():
    with pytest.raises(ValueError, match="'abc' cannot be used to seed"):
        spawn_seeds("abc", 2)


def test_generators_of_one_seed_draw_the_same():
    draws = [torch.rand(5, generator=generator_from(seed)) for seed in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_generators_leave_the_global_state_alone():
    before = torch.get_rng_state()
    torch.rand(5, generator=generator_from(7))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_place_of_a_run_has_a_seed_of_its_own():
    places = [(0, step, rank) for step in range(50) for rank in range(4)]
    seeds = {derived_seed(*place) for place in places}
    assert len(seeds) == len(places) and derived_seed(0, 3, 1) == derived_seed(0, 3, 1)
    assert derived_seed(2**62, 3, 1) not in seeds


def test_isolated_seed_is_deterministic_and_puts_the_global_state_back():
    before = torch.get_rng_state()
    draws = []
    for seed in (5, 5, 6):
        with isolated_seed(seed):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_isolated_seed_puts_the_global_state_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), isolated_seed(1):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
