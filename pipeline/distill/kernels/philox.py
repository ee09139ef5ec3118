"""Counter-based random bits (Philox 4x32-10, Salmon et al., SC 2011): a mask is a function of what it masks.

Counter layout: c0 = head * N + token, c1 = tensor + 4 * (8 * block + plane), c2 = sample id, c3 = step; the key
is the seed. So a mask depends neither on batch order, batch size, world size nor device. 32-bit words are held
in int64 tensors, as torch has no unsigned arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
PLANES = 8  # binary digits of a probability


@dataclass(frozen=True)
class Key:
    """What a random draw is keyed by: the run's seed, each sample's id (B,) int64, the optimiser step.

    `words` (2,) int64 holds seed and step on the device of the ids, where they were copied with them.
    """

    seed: int
    ids: Tensor
    step: int
    words: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, stream: Tensor) -> Key:
        """From what `stream` gives; waits for the device."""
        seed, step = stream.tolist()
        return cls(seed, ids, step)

    def on(self, device: torch.device) -> Key:
        """The key on a device: ids, seed and step in one copy."""
        words = torch.cat([torch.tensor([self.seed, self.step]), self.ids.to(torch.int64)])
        words = words.to(device, non_blocking=True)
        return Key(self.seed, words[2:], self.step, words[:2])

    def stream(self) -> Tensor:
        """(2,) int64: seed and step beside the ids, filled in on their device if not copied with them."""
        if self.words is not None:
            return self.words
        words = [
            torch.full((1,), v, dtype=torch.int64, device=self.ids.device)
            for v in (self.seed, self.step)
        ]
        return torch.cat(words)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> list[Tensor]:
    """Four counter words (broadcastable int64 in [0, 2^32)) and a 64-bit seed -> four random words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(ROUNDS):
        # 64-bit products wrap around and shifts drag the sign along: the halves, cut to 32 bits, are exact.
        wide0, wide1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = wide0 >> 32, wide1 >> 32
        c0 = high1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW)
        c2 = high0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW)
        c1, c3 = wide1.bitwise_and_(LOW), wide0.bitwise_and_(LOW)
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return [c0, c1, c2, c3]


def rounded(p: float) -> float:
    """Round `p` to the probability that its mask has, a multiple of 1/256."""
    return round(p * (1 << PLANES)) / (1 << PLANES)


def bernoulli(key: Key, rows: int, width: int, tensor: int, p: float) -> Tensor:
    """Masks (B, rows, width) bool, each element True with probability `p`, rounded to 8 binary digits (`rounded`).

    `tensor` (0..3) separates independent masks of one step. Bits are compared with p digit by digit, all
    elements of a word at once: p = 0.5 costs one word for 32 elements.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}; expected 0 to 1")
    device, shape = key.ids.device, (len(key.ids), rows, width)
    digits = round(rounded(p) * (1 << PLANES))
    if digits in (0, 1 << PLANES):
        return torch.full(shape, digits > 0, device=device)
    blocks = -(-width // 128)
    row = torch.arange(rows, device=device)[None, :, None]
    block = torch.arange(blocks, device=device)[None, None, :]
    sample = (key.ids.to(torch.int64) & LOW)[:, None, None]
    step = torch.tensor(key.step & LOW, device=device)
    words = min(4, -(-width // 32))  # of the four of a counter, those that are needed
    bits = torch.zeros(len(key.ids), rows, blocks, words, dtype=torch.int64, device=device)
    first = (digits & -digits).bit_length() - 1  # planes below the last 1 of p decide nothing
    for plane in range(first, PLANES):
        c1 = tensor + 4 * (PLANES * block + (PLANES - 1 - plane))
        word = torch.stack(philox((row, c1, sample, step), key.seed)[:words], dim=-1)
        bits = (bits | word) if digits >> plane & 1 else (bits & word)
    used = min(4, -(-width // 8))  # bytes of a word, little-endian
    low = bits.view(torch.uint8).unflatten(-1, (words, 8))[..., :used, None]
    positions = 1 << torch.arange(8, dtype=torch.uint8, device=device)
    masks: Tensor = (low & positions) != 0
    return masks.reshape(len(key.ids), rows, -1)[:, :, :width]
