"""A dataset of Hugging Face's `datasets` (optional), as a source for scripts/prepare_data.py.

The script reads the stream once, into a corpus on disk. A run cannot read a stream, because a stream has no sample i.

Proof: tests/test_data.py::test_hf_stream_makes_a_job_per_shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from errors import ConfigError


@dataclass(frozen=True)
class HFStream:
    """A Source (data/sources.py). name is a dataset or a folder; it is never on this machine whole."""

    name: str
    subset: str
    split: str
    text_key: str

    def __str__(self) -> str:
        return f"{self.name}, {self.split}"

    def fingerprint(self) -> str:
        # The first word is the class's name in corpora that were begun by earlier versions.
        return repr(self).replace("HFStream(", "Stream(", 1)

    def jobs(self, shard_bytes: int) -> list["HFStreamJob"]:
        """A job for each of the dataset's shards. shard_bytes is not used: their sizes are not known in advance."""
        return [HFStreamJob(self, number) for number in range(self.load().num_shards)]

    def load(self):
        try:
            import datasets
        except ImportError:
            raise ConfigError(f"{self.name} is read with Hugging Face's datasets: pip install datasets.") from None
        return datasets.load_dataset(self.name, self.subset or None, split=self.split, streaming=True)


@dataclass(frozen=True)
class HFStreamJob:
    """The documents of a shard of the dataset, read as they arrive."""

    source: HFStream
    number: int

    def __iter__(self) -> Iterator[str]:
        stream, text_key = self.source.load(), self.source.text_key
        for record in stream.shard(num_shards=stream.num_shards, index=self.number):
            text = record.get(text_key)
            if not isinstance(text, str):
                raise ConfigError(
                    f'{self.source.name} has no string under "{text_key}" (text_key); it has keys {", ".join(record)}.'
                )
            if text:
                yield text
