"""Long real text that is on every machine: what CPython brings along."""

from __future__ import annotations

import pydoc_data.topics


def documentation() -> str:
    """About 700 KB of English: the language reference as `help()` shows it, topics in alphabetical order."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
