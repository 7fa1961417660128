"""Which corpus a sample of a weighted mixture comes from, as a pure function of its number.

The numbers i = 0, 1, 2, ... are sent to the points i x golden ratio (mod 1), which fill the interval as evenly as can
be (Weyl; Knuth, The Art of Computer Programming 3, section 6.4, theorem S), and each corpus owns a part of the interval
as large as its weight. So any stretch of n samples holds n x weight of a corpus, up to one or two. How many samples of
the corpus came before is counted without a loop over them: as a sum of floors, in the steps of Euclid's algorithm.
"""

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b

ONE = 2**32  # the interval, in integers
GOLDEN = 2654435769  # round(ONE / 1.618...), odd, so that all ONE points are visited


class Mixture:
    """weights: positive, one a corpus, of any sum."""

    def __init__(self, weights: Sequence[float], seed: int):
        total, below = sum(weights), 0.0
        self.bounds = [0]
        for weight in weights:
            below += weight
            self.bounds.append(round(below / total * ONE))
        self.offset = int.from_bytes(blake2b(b"mixture %d" % seed, digest_size=4).digest(), "little")

    def __call__(self, i: int) -> tuple[int, int]:
        """The corpus of sample i, and how many of the samples before it are of that corpus."""
        point = (i * GOLDEN + self.offset) % ONE
        corpus = bisect_right(self.bounds, point) - 1
        return corpus, self.count(corpus, i)

    def count(self, corpus: int, n: int) -> int:
        """How many of the samples 0 ... n - 1 are of a corpus."""
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
