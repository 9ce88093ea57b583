"Seeds from names, one generator per image: laws, collisions, and a witness that shares no code."
import hashlib
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jat_nb.randomness import image_generators, seed_from, uniform

names = st.lists(st.one_of(st.integers(-5, 10**12), st.text(st.characters(exclude_characters="/"), max_size=6)),
                 min_size=1, max_size=4)


def draws(seed: int) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist())


@settings(max_examples=100, deadline=None)
@given(names, names)
def test_a_seed_is_a_hash_of_its_name(first, second):
    text = "/".join(map(str, first))
    expected = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    assert seed_from(*first) == expected and 0 <= expected < 2**56
    assert (seed_from(*first) == seed_from(*second)) == (list(map(str, first)) == list(map(str, second)))


def test_neighbours_share_no_seed():
    "Seed 1 at step 0 is another draw than seed 0 at step 1, also in the 32 bits that a CPU generator keeps."
    places = list(product(range(5), range(7), range(40), range(2)))
    assert len({seed_from(*p) % 2**32 for p in places}) == len(places)
    assert draws(seed_from(1, 0)) != draws(seed_from(0, 1))


def test_a_slash_would_make_two_names_one():
    with pytest.raises(ValueError, match="'a/b'"):
        seed_from("a/b", 1)


def test_bits_of_an_evaluation_stay_what_they_were():
    seen = [int(torch.randint(2**30, (), generator=g)) for g in image_generators(3, [0, 41], part=2)]
    for image, value in zip((0, 41), seen):
        key = int.from_bytes(hashlib.blake2b(f"3/{image}/2".encode(), digest_size=7).digest(), "big")
        assert value == int(torch.randint(2**30, (), generator=torch.Generator().manual_seed(key)))


def test_image_generators_depend_on_seed_image_and_part():
    seen = {torch.rand(3, generator=image_generators(*a)[0])[0].item() for a in ((0, [1], 0), (1, [1], 0), (0, [2], 0), (0, [1], 1))}
    assert len(seen) == 4


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_an_image_draws_the_same_in_every_batch(order, size, dtype):
    like = torch.empty(6, 2, 3, dtype=dtype)
    together = uniform(like, image_generators(0, range(6)))
    apart = torch.empty_like(like)
    for i in range(0, 6, size):
        rows = order[i:i + size]
        apart[rows] = uniform(like[rows], image_generators(0, rows))
    assert torch.equal(apart, together) and together.dtype == dtype
    assert 0 <= together.min() and together.max() < 1 or dtype == torch.float16


def test_one_generator_for_a_batch_and_none_for_the_global_state():
    like = torch.empty(3, 4)
    assert torch.equal(uniform(like, torch.Generator().manual_seed(5)), torch.rand(3, 4, generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(8)
    first = uniform(like)
    torch.manual_seed(8)
    assert torch.equal(first, uniform(like))
    assert uniform(torch.empty(0, 4), []).shape == (0, 4)
    with pytest.raises(ValueError, match="got 2 for a batch of 3"):
        uniform(like, image_generators(0, [0, 1]))
