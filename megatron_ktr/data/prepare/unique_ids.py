"""Makes problem ids unique within a file, in constant memory."""

from __future__ import annotations

import xxhash

_NUM_BITS = 1 << 27
_NUM_PROBES = 4


class UniqueIds:
    """Ids as they were, or with "#<number of the record>" behind them if they were seen before.

    A Bloom filter of 16 MiB remembers the ids. It never forgets one, so that the result is unique; among n ids it takes
    a new one for a repeated one with probability (1 - e^(-4 n / 2^27))^4, 8e-7 at n = 10^6, which costs a suffix.
    """

    def __init__(self) -> None:
        self._bits = bytearray(_NUM_BITS // 8)
        self.num_changed = 0

    def make_unique(self, problem_id: str, *, number: int) -> str:
        unique, num_tries = problem_id, 0
        while not self._add(unique):
            num_tries += 1
            unique = f"{problem_id}#{number}" + (f".{num_tries}" if num_tries > 1 else "")
        self.num_changed += unique != problem_id
        return unique

    def _add(self, text: str) -> bool:
        """Whether the text is new; it is not any more."""
        digest = xxhash.xxh3_128(text.encode(errors="surrogatepass")).intdigest()
        is_new = False
        for _ in range(_NUM_PROBES):
            digest, place = divmod(digest, _NUM_BITS)
            byte, bit = place >> 3, 1 << (place & 7)
            is_new |= not self._bits[byte] & bit
            self._bits[byte] |= bit
        return is_new
