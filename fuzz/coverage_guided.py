"""Fuzzes the targets with Atheris: `python -m fuzz.coverage_guided`.

It keeps each input that reaches new code in `build/fuzz`. The next run begins with these inputs. An input for which a target
raises is written there too: when the problem is solved, add the input to the seeds of the target.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

CORPUS: Final = Path("build/fuzz")
MAX_BYTES: Final = 4096
"""The length of the longest input."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzzes each target in a process of its own, and prints a table. Exits with 1 if a target raises."""
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10, help="how long each target is fuzzed at most (default: 10)")
    parser.add_argument("--runs", type=int, default=10_000_000, help="how many inputs it gets at most (default: 10000000)")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    options = parser.parse_args(arguments)
    print("| target | inputs | inputs/s | branches reached | inputs kept | raised |")
    print("| --- | --- | --- | --- | --- | --- |")
    failed = False
    for name in options.target or TARGETS:
        command = [sys.executable, "-m", "fuzz.coverage_guided", "--fuzz", name]
        limits = [f"-max_total_time={options.seconds}", f"-runs={options.runs}"]
        done = subprocess.run([*command, *limits], capture_output=True, text=True, check=False)  # noqa: S603 - our own command
        said = done.stdout + done.stderr
        figures = [_figure(pattern, said) for pattern in (r"executed_units: +(\d+)", r"exec_per_sec: +(\d+)", r".* cov: (\d+)")]
        kept = len([*(CORPUS / name).iterdir()])
        print("|", " | ".join([name, *figures, str(kept), "yes" if done.returncode else "no"]), "|", flush=True)
        if done.returncode:
            failed = True
            print(said[-4000:], file=sys.stderr)
    sys.exit(failed)


def _figure(pattern: str, text: str) -> str:
    """Returns the last figure of this kind in the output of libFuzzer."""
    return next(reversed(re.findall(pattern, text)), "-")


def fuzz(name: str, flags: Sequence[str]) -> None:
    """Fuzzes one target with these flags of libFuzzer, which then ends the process."""
    import atheris

    with atheris.instrument_imports(include=["flywheel_server"]):
        from fuzz.targets import SEEDS, TARGETS
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    own = [f"-max_len={MAX_BYTES}", "-timeout=10", "-print_final_stats=1", f"-artifact_prefix={CORPUS}/{name}-"]
    atheris.Setup([sys.argv[0], *own, *flags, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(sys.argv[2], sys.argv[3:])
    main()
