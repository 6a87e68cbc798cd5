"""The only randomness of a synthetic CT: counter-based streams, so that the same keys give the same
image anywhere.

Philox-4x64 (Salmon et al., SC 2011), keyed by the seed, what the case is (not what its file is
called) and the variant; the slice is the counter. No draw depends on batch size, order, worker or
machine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


class CaseRandom:
    """The streams of one (seed, case digest, variant)."""

    def __init__(self, seed: int, digest: bytes, variant: int):
        self._key = hashlib.sha256(
            f"mask2ct seed {seed} variant {variant} case ".encode() + digest
        ).digest()

    def noise(self, k: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """White noise bytes (H, W), uniform over 0..255, for slice k."""
        count = shape[0] * shape[1]
        return self._raw(0, k, -(-count // 8)).view(np.uint8)[:count].reshape(shape)

    def style(self, size: int) -> NDArray[np.float32]:
        """One standard normal vector (size,) for the volume."""
        bits = np.random.Generator(np.random.Philox(key=self._words(1)))
        return bits.standard_normal(size).astype(np.float32)

    def shape(self, attempt: int, count: int) -> NDArray[np.float64]:
        """Numbers uniform in [-1, 1) (count,): how the variant's mask differs from the case's,
        at the given attempt.
        """
        key = np.frombuffer(hashlib.sha256(b"shape " + self._key).digest()[:16], "<u8").astype(
            np.uint64
        )
        raw = np.random.Philox(key=key, counter=[0, 0, 0, attempt]).random_raw(count)
        return np.asarray((raw >> np.uint64(11)) * 2.0**-52 - 1)

    def intensity(self, count: int) -> NDArray[np.float64]:
        """Standard normal numbers (count,): how far the intensities of a warped image move."""
        key = np.frombuffer(hashlib.sha256(b"intensity " + self._key).digest()[:16], "<u8").astype(
            np.uint64
        )
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(count)

    def _raw(self, domain: int, k: int, words: int) -> NDArray[np.uint64]:
        stream = np.random.Philox(key=self._words(domain), counter=[0, 0, 0, k])
        return np.asarray(stream.random_raw(words)).astype("<u8")

    def _words(self, domain: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._key[16 * domain : 16 * domain + 16], "<u8").astype(np.uint64)
