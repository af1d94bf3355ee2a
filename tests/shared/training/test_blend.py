"""The division of a stream among sources."""

import pytest

from shared.training.blend import Blend

THREE = Blend.of(["a", "b", "c"], [700, 90, 31], [0.5, 0.3, 0.2])


def test_each_source_is_read_in_its_own_order_without_a_gap():
    seen = {0: 0, 1: 0, 2: 0}
    for position in range(1000):
        source, place = THREE.locate(position)
        assert place == seen[source]
        seen[source] += 1
        assert THREE.counts(position + 1) == tuple(seen.values())


@pytest.mark.parametrize("begin", [0, 1, 333, 10**12 + 7])
def test_every_stretch_has_the_shares(begin: int):
    """Within two samples: rounding of each of two divisions."""
    sources = [THREE.locate(position)[0] for position in range(begin, begin + 97)]
    for source, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(sources.count(source) - 97 * share) <= 2


def test_weights_are_the_decimal_numbers_that_they_are_written_as():
    assert Blend.of(["a", "b"], [9, 9], [0.7, 0.3]).weights == (7, 3)
    assert Blend.of(["a", "b"], [9, 9], [7, 3]).locate(12345) == Blend.of(["a", "b"], [9, 9], [0.7, 0.3]).locate(12345)
    assert Blend.of(["a", "b", "c"], [9] * 3, [0.1, 1e-3, 3]).weights == (100, 1, 3000)


@pytest.mark.parametrize(
    "blend",
    [THREE, Blend.of(["a", "b"], [3, 1000]), Blend.of(["a"], [5]), Blend.of(["a", "b", "c"], [7, 7, 7], [1, 1, 5])],
)
def test_an_epoch_reads_nothing_twice_and_is_the_longest_that_does_not(blend: Blend):
    assert all(count <= n for count, n in zip(blend.counts(blend.epoch), blend.sequences, strict=True))
    assert any(count > n for count, n in zip(blend.counts(blend.epoch + 1), blend.sequences, strict=True))


def test_without_weights_an_epoch_is_all_of_every_source():
    blend = Blend.of(["a", "b", "c"], [70, 9, 31])
    assert (blend.epoch, blend.counts(110)) == (110, (70, 9, 31))
    assert [fact["epochs"] for fact in blend.facts(220)] == [2.0, 2.0, 2.0]


def test_facts_state_the_epochs_of_each_source():
    assert THREE.facts(100) == [
        {"name": "a", "share": 0.5, "sequences": 700, "epochs": 0.0714},
        {"name": "b", "share": 0.3, "sequences": 90, "epochs": 0.3333},
        {"name": "c", "share": 0.2, "sequences": 31, "epochs": 0.6452},
    ]
