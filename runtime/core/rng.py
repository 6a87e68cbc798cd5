"""The only randomness of a synthetic CT: counter-based, so equal keys give equal images anywhere.

Philox-4x64 (Salmon et al., SC 2011). The key is the seed, the digest of the case (not its file
name) and the variant; the slice is the counter. No draw depends on batch size, order, worker or
machine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# The weights of a mixture of draws are integers of this scale.
MIXTURE_SCALE = 4096


class CaseRandom:
    """The random numbers of one variant of a case.

    Args:
        seed: The seed of the run.
        digest: What identifies the case (`LabelVolume.digest`).
        variant: The number of the variant.
        noise_along_z: The share of a neighbouring slice's noise in a slice's noise, relative to
            that of its own.
    """

    def __init__(self, seed: int, digest: bytes, variant: int, noise_along_z: float = 0.0):
        self._along_z = noise_along_z
        self._key = hashlib.sha256(
            f"mask2ct seed {seed} variant {variant} case ".encode() + digest
        ).digest()

    def noise(self, k: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """Noise for one slice, white in the slice.

        With `noise_along_z`, it is a mixture of three draws, of the same variance; neighbours
        share two of them. Integers make the same bytes on every machine.

        Args:
            k: Index of the slice.
            shape: (H, W) of the canvas in pixels.

        Returns:
            uint8 (H, W), uniform over 0..255; a mixture is nearly normal.
        """
        if not self._along_z:
            return self._white(k, shape)
        share = self._along_z
        norm = MIXTURE_SCALE / np.sqrt(1 + 2 * share**2)
        own, beside = round(norm), round(share * norm)
        before, middle, after = (
            self._white(k + n, shape).astype(np.int32) * 2 - 255 for n in range(3)
        )
        mixed = beside * (before + after) + own * middle
        # Twice the value about the middle, in units of 1 / MIXTURE_SCALE.
        values = (mixed + 256 * MIXTURE_SCALE) // (2 * MIXTURE_SCALE)
        return np.clip(values, 0, 255).astype(np.uint8)

    def _white(self, k: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """Uniform bytes (H, W) of one counter."""
        count = shape[0] * shape[1]
        return self._raw(0, k, -(-count // 8)).view(np.uint8)[:count].reshape(shape)

    def style(self, size: int) -> NDArray[np.float32]:
        """The style vector of the volume.

        Args:
            size: Length of the vector.

        Returns:
            float32 (size,), standard normal.
        """
        bits = np.random.Generator(np.random.Philox(key=self._words(1)))
        return bits.standard_normal(size).astype(np.float32)

    def shape(self, attempt: int, count: int) -> NDArray[np.float64]:
        """The numbers that deform the mask of the variant.

        Args:
            attempt: Number of the draw; each attempt draws anew.
            count: How many numbers.

        Returns:
            float64 (count,), uniform in [-1, 1).
        """
        key = np.frombuffer(hashlib.sha256(b"shape " + self._key).digest()[:16], "<u8").astype(
            np.uint64
        )
        raw = np.random.Philox(key=key, counter=[0, 0, 0, attempt]).random_raw(count)
        return np.asarray((raw >> np.uint64(11)) * 2.0**-52 - 1)

    def intensity(self, count: int) -> NDArray[np.float64]:
        """The numbers that move the intensities of a warped image.

        Args:
            count: How many numbers.

        Returns:
            float64 (count,), standard normal.
        """
        key = np.frombuffer(hashlib.sha256(b"intensity " + self._key).digest()[:16], "<u8").astype(
            np.uint64
        )
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(count)

    def layout(self, part: int, count: int) -> NDArray[np.float64]:
        """The numbers that a learned layout is drawn from.

        Args:
            part: 0 for the field, 1 for what no two patients share.
            count: How many numbers.

        Returns:
            float64 (count,), standard normal.
        """
        digest = hashlib.sha256(f"layout {part} ".encode() + self._key).digest()[:16]
        key = np.frombuffer(digest, "<u8").astype(np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(count)

    def _raw(self, domain: int, k: int, words: int) -> NDArray[np.uint64]:
        """Random 64-bit words (words,) of one purpose for slice k."""
        generator = np.random.Philox(key=self._words(domain), counter=[0, 0, 0, k])
        return np.asarray(generator.random_raw(words)).astype("<u8")

    def _words(self, domain: int) -> NDArray[np.uint64]:
        """Philox's key (2,) for one purpose: 0 noise, 1 style."""
        return np.frombuffer(self._key[16 * domain : 16 * domain + 16], "<u8").astype(np.uint64)
