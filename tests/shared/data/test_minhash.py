"""Signatures by rensa: the same in stretches, and near-duplicates as rensa's own index finds them."""

import itertools
import random

import numpy as np
from rensa import RMinHash, RMinHashLSH

from shared.data import minhash
from shared.data.deduplication import Groups
from shared.data.minhash import BANDS, HASHES, SEED, Signatures, shingles


def _corpus() -> list[str]:
    rng = random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    texts = []
    for _ in range(60):
        base = [rng.choice(words) for _ in range(rng.randint(60, 300))]
        texts.append(" ".join(base))
        for share in (0.0, 0.01, 0.02, 0.04, 0.08, 0.2):  # from copies to other texts
            texts.append(" ".join(rng.choice(words) if rng.random() < share else word for word in base))
    rng.shuffle(texts)
    return [*texts, "", "four words are few", "Four words, are FEW"]


def _signatures(texts: list[str], size: int = 1 << 20) -> np.ndarray:
    made = Signatures()
    for text in texts:
        cuts = [0, *(at for at in range(size, len(text), size) if text[at] == " "), len(text)]
        for start, end in itertools.pairwise(cuts):
            made.update(text[start:end])
        made.close()
    return made.array()


def test_near_duplicates_are_those_of_the_librarys_index() -> None:
    texts = _corpus()
    groups, found = Groups(len(texts)), _signatures(texts)
    for band in range(BANDS):
        groups.join(lambda at=band: [(found[:, at], found[:, at])])  # type: ignore[misc]
    dropped = groups.first() != np.arange(len(texts))

    index = RMinHashLSH(threshold=0.7, num_perm=HASHES, num_bands=BANDS)
    own = []
    for number, text in enumerate(texts):
        words = minhash._WORD.findall(text.lower())
        own.append(RMinHash(num_perm=HASHES, seed=SEED))
        own[-1].update(shingles(words) or [" ".join(words)])
        index.insert(number, own[-1])
    first = list(range(len(texts)))
    for _ in range(8):  # the smallest number of all that are connected
        for each in own:
            near = index.query(each)
            least = min(first[other] for other in near)
            for other in near:
                first[other] = least
    assert groups.first().tolist() == first
    assert 200 < dropped.sum() < 360
    assert dropped[-1]  # case and punctuation do not count


def test_stretches_do_not_change_a_signature() -> None:
    texts = _corpus()[:20]
    assert np.array_equal(_signatures(texts), _signatures(texts, size=7))


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert minhash._WORD.findall("ab_c \u4f60\u597d, \u00e9t\u00e9") == ["ab_c", "\u4f60", "\u597d", "\u00e9t\u00e9"]
