"""Streams three samples of a prompt side by side, each in a column of the terminal."""

import argparse
import shutil
import sys
from itertools import zip_longest
from textwrap import wrap

from flywheel_client import Client, FlywheelError


def draw(texts: list[str], height: int) -> int:
    """Prints the texts as columns, over the last `height` lines of the terminal. Returns the number of lines printed."""
    width = shutil.get_terminal_size().columns // len(texts) - 2
    rows = zip_longest(*(wrap(text, width) for text in texts), fillvalue="")
    lines = ["  ".join(cell.ljust(width) for cell in row).rstrip() for row in rows] or [""]
    print(f"\x1b[{height}F\x1b[J" if height else "", "\n".join(lines), sep="", flush=True)
    return len(lines)


def main(address: str, prompt: str) -> None:
    """Draws the samples at each delta, or only at the end if the output is no terminal."""
    texts, height = ["", "", ""], 0
    with Client(address) as client, client.generate_deltas(prompt, max_tokens=64, num_samples=3, timeout=60) as deltas:
        for delta in deltas:
            texts[delta.index] += "".join(character if character.isprintable() else " " for character in delta.text)
            if sys.stdout.isatty():
                height = draw(texts, height)
    draw(texts, height)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--address", default="localhost:50051")
    try:
        main(**vars(parser.parse_args()))
    except FlywheelError as error:
        sys.exit(str(error))
