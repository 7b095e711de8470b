"""Shared by the fuzzers: seeded damage to bytes, and a watch over the time and memory of what reads them."""

import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Cases of each fuzzer; FUZZ_SCALE=10 pytest tests/test_fuzz_*.py is the long run, with other cases.
SCALE = int(os.environ.get("FUZZ_SCALE", 1))
CASES = 2000 * SCALE
SECONDS = 5  # for one case
MEGABYTES = 400  # that a fuzzer's cases may add to the process
EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


class Hang(BaseException):
    """A case took too long; no ``except Exception`` stops it."""


@contextmanager
def watched(megabytes: int = MEGABYTES) -> Iterator[None]:
    """Around all cases of a fuzzer: memory that one of them took stays in the process's peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < megabytes, f"a case took {grown} MB"


@contextmanager
def in_time(case: object) -> Iterator[None]:
    """Around one case."""

    def stop(*_: object) -> None:
        raise Hang(f"case {case} takes more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def damage(rng: random.Random, content: bytes) -> bytes:
    """Content after one to four faults: flipped bits, extreme numbers, lost, doubled, zeroed and foreign pieces."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 16, 64, 512))
        kind = rng.randrange(8)
        if kind in (0, 1) and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(EXTREMES) & (2 ** (8 * width) - 1)
            data[place : place + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length] * rng.choice((1, 1, 1, 50))
        elif kind == 5:
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == 6:
            data[place : place + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)
