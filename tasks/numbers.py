"""Numbers that options of commands and scripts take: argparse says which one is none, and stops."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number of at least 1; raises ArgumentTypeError for another."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def amount(text: str) -> float:
    """A number above 0; raises ArgumentTypeError for another."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return found
