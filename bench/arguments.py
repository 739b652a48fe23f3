"""What the command lines have in common."""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output, the folder of the result files."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path(__file__).parent / "results",
        help="where CSV, JSON, Markdown and PNG go (default: bench/results)",
    )


def name(known: Collection[str], kind: str) -> Callable[[str], str]:
    """A parser of one name."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}; known: {', '.join(known)}")
        return text

    return parse


def names(known: Collection[str], kind: str) -> Callable[[str], tuple[str, ...]]:
    """A parser of names separated by commas."""
    one = name(known, kind)
    return lambda text: tuple(dict.fromkeys(one(item.strip()) for item in text.split(",")))


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A parser of numbers above zero."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
        return value

    return parse
