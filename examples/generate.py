"""Generates three samples of a prompt, and prints each one as soon as it has finished."""

import argparse
import sys

from flywheel_client import Client, FlywheelError, InvalidArgumentError


def main(address: str, prompt: str, max_tokens: int) -> None:
    """Prints the samples. Exits with 1 if the call fails, with the reason on standard error."""
    try:
        with Client(address, timeout=60) as client:
            for sample in client.generate(prompt, max_tokens=max_tokens, num_samples=3, temperature=0.8):
                print(f"--- sample {sample.index}: {sample.generated_tokens} tokens, finish reason {sample.finish_reason}")
                print(sample.text)
    except InvalidArgumentError as error:
        sys.exit("\n".join(f"{violation.field} {violation.description}" for violation in error.violations))
    except FlywheelError as error:
        sys.exit(f"{error} (request id {error.request_id})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="What is the difference between a llama and an alpaca?")
    parser.add_argument("--address", default="localhost:50051")
    parser.add_argument("--max-tokens", type=int, default=64)
    main(**vars(parser.parse_args()))
