"""Everyday words to make keys and lists from."""

from __future__ import annotations

import numpy as np

NOUNS = (
    "anchor", "apple", "arrow", "basket", "beach", "bell", "bicycle", "blanket", "boat", "bottle", "bridge", "broom",
    "bucket", "butter", "button", "camera", "candle", "carpet", "castle", "chair", "cheese", "cherry", "chimney",
    "clock", "cloud", "coffee", "copper", "cotton", "curtain", "desert", "diamond", "dragon", "drum", "eagle",
    "engine", "feather", "fence", "flute", "forest", "fountain", "garden", "garlic", "glove", "guitar", "hammer",
    "harbor", "hat", "honey", "horse", "island", "jacket", "jungle", "kettle", "kitten", "ladder", "lamp", "lemon",
    "lion", "lobster", "magnet", "maple", "marble", "meadow", "mirror", "monkey", "mountain", "mushroom", "needle",
    "ocean", "onion", "orange", "orchard", "oven", "owl", "painter", "palace", "paper", "peanut", "pencil", "pepper",
    "piano", "pigeon", "pillow", "pirate", "planet", "potato", "pumpkin", "rabbit", "rain", "ribbon", "river",
    "rocket", "sailor", "salmon", "scarf", "shovel", "silver", "snow", "spider", "spoon", "statue", "sugar",
    "sunset", "sword", "teapot", "temple", "thunder", "tiger", "tomato", "tower", "trumpet", "tulip", "turtle",
    "umbrella", "valley", "velvet", "violin", "volcano", "wagon", "walnut", "whale", "window", "winter", "wolf",
)  # fmt: skip
ADJECTIVES = (
    "brave", "bright", "calm", "clever", "cold", "dusty", "eager", "fancy", "gentle", "golden", "grumpy", "happy",
    "heavy", "hollow", "humble", "lazy", "lonely", "lucky", "mellow", "noisy", "odd", "pale", "plain", "proud",
    "quick", "quiet", "rusty", "shiny", "shy", "silent", "sleepy", "small", "spicy", "tall", "tiny", "vivid", "warm",
    "wild", "wise", "young",
)  # fmt: skip


def draw(rng: np.random.Generator, words: tuple[str, ...], count: int) -> list[str]:
    """So many different ones."""
    return [words[place] for place in rng.permutation(len(words))[:count].tolist()]


def numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """So many different numbers of so many digits, none of which starts with 0."""
    low = 10 ** (digits - 1)
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(rng.integers(low, 10 * low))] = None
    return list(found)
