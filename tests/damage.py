"""Ways in which a file goes wrong: on a disk, in transit, by hand, or on purpose."""

from __future__ import annotations

import json
import random
import re
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, "", "a", "../a", "/etc/passwd",
    "\x00", "é" * 50, "9" * 30, "F64", "xkv", [], {}, [[]], [None], [0, -1], {"a": {}}, [1] * 300,
)  # fmt: skip
HUGE = (
    b"999999999999999999999999", b"1e400", b"-1", b"0.1", b"18446744073709551616", b"NaN", b"1" * 5000,
    b"1e" + b"1" * 5000,
)  # fmt: skip


def damaged(content: bytes, chance: random.Random) -> bytes:
    """`content` with bits turned, bytes lost, repeated, added or swapped, or another number written into it."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        start = chance.randrange(len(data) + 1) if chance.random() < 0.6 else chance.randrange(min(len(data), 200) + 1)
        stop = start + chance.choice((1, 1, 2, 8, 100, 5000))
        match chance.randrange(7):
            case 0 if start < len(data):
                data[start] ^= 1 << chance.randrange(8)
            case 1:
                del data[start:]
            case 2:
                del data[start:stop]
            case 3:
                data[start:start] = data[start:stop]
            case 4:
                data[start:stop] = chance.randbytes(chance.choice((1, 4, 8, 64)))
            case 5:
                data[start:stop] = bytes(len(data[start:stop]))
            case 6:
                numbers = list(re.finditer(rb"\d+(\.\d+)?", bytes(data[:20_000])))
                if numbers:
                    place = chance.choice(numbers)
                    data[place.start() : place.end()] = chance.choice(HUGE)
    return bytes(data)


def rewritten(value: Any, chance: random.Random) -> Any:
    """JSON in which something, somewhere, is of another type or size, is missing, or is too many."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(STRANGE)
    if isinstance(value, list):
        copy = list(value)
        place = chance.randrange(len(copy))
        match chance.randrange(6):
            case 0:
                del copy[place]
            case 1:
                copy.insert(place, copy[place])
            case _:
                copy[place] = rewritten(copy[place], chance)
        return copy
    copy = dict(value)
    name = chance.choice(list(copy))
    match chance.randrange(8):
        case 0:
            del copy[name]
        case 1:
            copy[chance.choice(("", "extra", name + "_", "__proto__"))] = chance.choice(STRANGE)
        case 2:
            other = chance.choice(list(copy))
            copy[name], copy[other] = copy[other], copy[name]
        case _:
            copy[name] = rewritten(copy[name], chance)
    return copy


def rewritten_json(content: bytes, chance: random.Random) -> bytes:
    """As `rewritten`, for a whole file of JSON."""
    return json.dumps(rewritten(json.loads(content), chance)).encode()


def rewritten_header(content: bytes, chance: random.Random, key: str) -> bytes:
    """A safetensors file with another header: torch's own part of it, or our JSON under `key` in its metadata."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if chance.random() < 0.3:
        header = rewritten(header, chance)
    else:
        header["__metadata__"][key] = json.dumps(rewritten(json.loads(header["__metadata__"][key]), chance))
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + content[8 + size :]
