"""Repeats one of three samples: the same request with the seed of that sample gives its text again, on the same server."""

import argparse
import sys

from flywheel_client import Client, FlywheelError, Sample


def samples(client: Client, prompt: str, seed: int, num_samples: int) -> tuple[Sample, ...]:
    """Returns the samples of a request that sets its seed. The sample with index i has seed + i.

    A seed that the server draws would not do: it repeats a sample only if nothing else was computed with the sample.
    """
    return client.generate_all(prompt, max_tokens=32, num_samples=num_samples, temperature=0.8, seed=seed).responses


def main(address: str, prompt: str, seed: int) -> None:
    """Prints three samples, and the second one again. Exits with 1 if the server does not promise that, or a call fails."""
    try:
        with Client(address, timeout=60) as client:
            if not client.model().exact_seeds:
                sys.exit("samples with the same seed may differ on this server")
            first, second, third = samples(client, prompt, seed, 3)
            (repeated,) = samples(client, prompt, second.seed, 1)
    except FlywheelError as error:
        sys.exit(str(error))
    for sample in (first, second, third, repeated):
        print(f"--- seed {sample.seed}\n{sample.text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Write one line about the sea.")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--address", default="localhost:50051")
    main(**vars(parser.parse_args()))
