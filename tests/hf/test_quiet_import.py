"""What torchao and torch log while transformers imports them is kept from users; nothing else is."""

from __future__ import annotations

import logging

from xkv_fx.hf.quiet_import import NOISY, without_warnings_of


def test_only_warnings_and_only_meanwhile() -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    names = (*NOISY, "another")
    levels = [logging.getLogger(name).level for name in NOISY]
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        with without_warnings_of(NOISY):
            for name in names:
                logging.getLogger(name).warning("%s warns", name)
                logging.getLogger(name).error("%s fails", name)
        logging.getLogger(NOISY[0]).warning("again")
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
    assert heard == [f"{NOISY[0]} fails", f"{NOISY[1]} fails", "another warns", "another fails", "again"]
    assert [logging.getLogger(name).level for name in NOISY] == levels
