"""The loader: its order is a permutation, and its position is the whole state."""

import itertools
from collections import Counter

import pytest
import torch

from transnormer.data.loader import Loader, window_index
from transnormer.data.shards import TokenData

# The permutation.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 100, 255, 256, 257, 1000, 4097])
def test_every_window_comes_once_an_epoch(count):
    for seed, epoch in ((0, 0), (0, 1), (7, 0), (-3, 2**40)):
        order = [window_index(seed, epoch, position, count) for position in range(count)]
        assert sorted(order) == list(range(count))


def test_the_order_changes_with_the_epoch_and_the_seed():
    def order(seed, epoch):
        return tuple(window_index(seed, epoch, position, 1000) for position in range(1000))

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(1, 2) == order(1, 2) != tuple(range(1000))
    # as few fixed points and neighbours as chance leaves: one or two expected of each
    assert sum(a == b for a, b in zip(order(0, 0), order(1, 0), strict=True)) < 12
    assert sum(b == a + 1 for a, b in itertools.pairwise(order(0, 0))) < 12


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_all_orders_are_about_as_likely(count):
    rounds = 400 * count
    firsts = Counter(window_index(0, epoch, 0, count) for epoch in range(rounds))
    assert all(abs(firsts[n] - 400) < 110 for n in range(count))  # over 5 standard deviations
    if count <= 4:
        seen = {tuple(window_index(0, e, p, count) for p in range(count)) for e in range(rounds)}
        assert len(seen) == [0, 1, 2, 6, 24][count]


def test_far_positions_cost_no_more():
    count = 10**15 + 37
    found = {window_index(3, 10**6, position, count) for position in range(count - 500, count)}
    assert len(found) == 500
    assert all(0 <= index < count for index in found)
    assert max(found) - min(found) > count // 2


def test_the_permutation_is_the_same_in_every_version():
    # a saved position means this order: a change here breaks every run that resumes
    assert [window_index(0, 0, position, 10) for position in range(10)] == [
        4,
        3,
        9,
        8,
        6,
        7,
        2,
        1,
        5,
        0,
    ]
    assert window_index(1234, 5, 678, 10**9) == 64_814_430


def test_positions_outside_are_refused():
    for position, count in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="position must be at least 0 and below count"):
            window_index(0, 0, position, count)


# The loader.


def take(batches, n):
    """The next n batches as windows, each torch.int64 [B, T + 1]."""
    found = [next(batches) for _ in range(n)]
    assert all(torch.equal(batch.ids[:, 1:], batch.targets[:, :-1]) for batch in found)
    assert all(batch.cu_seqlens is None for batch in found)
    return [torch.cat([batch.ids, batch.targets[:, -1:]], dim=1) for batch in found]


def test_batches_are_windows_that_overlap_by_one(prepared_scenes):
    data = TokenData(prepared_scenes)
    loader = Loader(data, seq_len=64, batch_size=3, seed=0)
    assert loader.count == (data.tokens - 1) // 64
    seen = torch.cat(take(loader, -(-loader.count // 3)))[: loader.count]
    assert seen.dtype == torch.int64
    assert seen.shape == (loader.count, 65)
    wanted = [tuple(data.window(64 * n, 65).tolist()) for n in range(loader.count)]
    assert Counter(map(tuple, seen.tolist())) == Counter(wanted)
    assert seen.tolist() != [list(row) for row in wanted]


def test_the_next_epoch_has_another_order(prepared_scenes):
    loader = Loader(TokenData(prepared_scenes), seq_len=128, batch_size=1, seed=0)
    first, second = (torch.cat(take(loader, loader.count)) for _ in range(2))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert loader.position == 2 * loader.count


@pytest.mark.parametrize(("ranks", "rows"), [(2, 4), (4, 2), (8, 1)])
def test_the_global_batch_does_not_depend_on_the_ranks(prepared_scenes, ranks, rows):
    data = TokenData(prepared_scenes)
    alone = Loader(data, seq_len=50, batch_size=8, seed=5)
    shared = [
        Loader(data, seq_len=50, batch_size=rows, seed=5, rank=r, ranks=ranks) for r in range(ranks)
    ]
    for _ in range(2 * alone.count // 8 + 2):  # over two epochs' ends
        assert torch.equal(take(alone, 1)[0], torch.cat([take(each, 1)[0] for each in shared]))
    assert {each.position for each in shared} == {alone.position}


def test_seek_goes_on_where_another_stopped(prepared_scenes):
    data = TokenData(prepared_scenes)
    whole = Loader(data, seq_len=40, batch_size=4, seed=9, rank=1, ranks=2)
    batches = take(whole, 40)
    other = Loader(data, seq_len=40, batch_size=4, seed=9, rank=1, ranks=2)
    next(other)
    other.seek(8 * 17)
    assert all(torch.equal(a, b) for a, b in zip(take(other, 23), batches[17:], strict=True))
    assert other.position == whole.position == 8 * 40
    # as many samples on, with other rows and ranks
    single = Loader(data, seq_len=40, batch_size=1, seed=9)
    single.seek(8 * 17 + 4)
    assert torch.equal(torch.cat(take(single, 4)), batches[17])


def test_another_seed_gives_other_batches(prepared_scenes):
    data = TokenData(prepared_scenes)
    first, second = (
        take(Loader(data, seq_len=16, batch_size=8, seed=seed), 1)[0] for seed in (0, 1)
    )
    assert not torch.equal(first, second)


def test_rows_are_the_callers_to_change(prepared_scenes):
    loader = Loader(TokenData(prepared_scenes), seq_len=16, batch_size=2, seed=0)
    batch = next(loader)
    batch.ids.zero_()
    assert batch.targets.any()
    loader.seek(0)
    assert next(loader).ids.any()


def test_loader_errors(prepared_scenes):
    data = TokenData(prepared_scenes)
    with pytest.raises(
        ValueError,
        match=f"train has {data.tokens} tokens, and one window of seq_len {data.tokens} needs",
    ):
        Loader(data, seq_len=data.tokens, batch_size=1, seed=0)
    assert Loader(data, seq_len=data.tokens - 1, batch_size=1, seed=0).count == 1
    for options, message in (
        ({"seq_len": 0}, "seq_len must be positive; got 0"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"ranks": 0}, "ranks must be positive"),
        ({"rank": 2, "ranks": 2}, "rank must be at least 0 and below ranks 2; got 2"),
        ({"rank": -1}, "rank must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Loader(data, **{"seq_len": 8, "batch_size": 1, "seed": 0, **options})
    with pytest.raises(ValueError, match="position must be 0 or more; got -1"):
        Loader(data, seq_len=8, batch_size=1, seed=0).seek(-1)
