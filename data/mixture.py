"""The corpus that each sample of a weighted mixture comes from, as a pure function of the sample's number.

Sample i = 0, 1, 2, ... is sent to the point i x golden ratio (mod 1). These points fill the interval from 0 to 1 as
evenly as possible (Weyl; Knuth, The Art of Computer Programming 3, section 6.4, theorem S). Each corpus owns a part of
the interval as large as its weight. So any stretch of n samples holds n x weight samples of a corpus, up to one or two.
The number of earlier samples of the same corpus is a sum of floors, counted in the steps of Euclid's algorithm.

Proof: tests/test_mixtures.py::test_counts_follow_weights, tests/test_mixtures.py::test_floor_sum_equals_the_sum.
"""

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate

ONE = 2**32  # the interval's length, in integers
GOLDEN = 2654435769  # round(ONE / 1.618...); odd, so that all ONE points are visited


class DatasetMixture:
    """Draws from corpora by weight. weights: a positive number for each corpus, of any sum."""

    def __init__(self, weights: Sequence[float], seed: int):
        total = sum(weights)
        self.bounds = [round(below / total * ONE) for below in accumulate(weights, initial=0.0)]
        self.offset = int.from_bytes(blake2b(b"mixture %d" % seed, digest_size=4).digest(), "little")

    def __call__(self, i: int) -> tuple[int, int]:
        """(corpus of sample i, number of samples before i of that corpus)."""
        point = (i * GOLDEN + self.offset) % ONE
        corpus = bisect_right(self.bounds, point) - 1
        return corpus, self.count(corpus, i)

    def count(self, corpus: int, n: int) -> int:
        """Number of samples of a corpus among the samples 0 ... n - 1."""
        # floor((x - low) / ONE) - floor((x - high) / ONE) is 1 where low <= x mod ONE < high, and 0 elsewhere.
        low, high = self.bounds[corpus : corpus + 2]
        start = self.offset + ONE
        return floor_sum(n, ONE, GOLDEN, start - low) - floor_sum(n, ONE, GOLDEN, start - high)


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """sum of floor((a j + b) / m) for j = 0 ... n - 1 (Graham, Knuth, Patashnik, Concrete Mathematics, section 3.5)."""
    total = 0
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        if a * n + b < m:
            return total
        n, b = divmod(a * n + b, m)  # the points below a line, counted along the other axis
        m, a = a, m
