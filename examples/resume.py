"""Takes up a stream that has broken off, for example because its server was stopped: the model continues its own text."""

import argparse
import sys

from flywheel_client import Client, UnavailableError


def main(address: str, question: str, max_tokens: int) -> None:
    """Prints the answer while it is generated. Exits with 1 if a call ends before it has brought any text."""
    text, tokens, finish_reason = "", 0, ""
    with Client(address, timeout=60) as client:
        while not finish_reason and tokens < max_tokens:
            messages = [("user", question)]
            if text:
                # The model continues a last message of the assistant. The rest may differ from what the unbroken stream would
                # have had, because the same text may have other tokens.
                messages.append(("assistant", text))
            before = tokens
            try:
                with client.generate_deltas(messages=messages, max_tokens=max_tokens - before) as deltas:
                    for delta in deltas:
                        print(delta.text, end="", flush=True)
                        text += delta.text
                        tokens, finish_reason = before + delta.generated_tokens, delta.finish_reason
            except UnavailableError as error:  # calls that fail before their stream begins, the client repeats by itself
                if tokens == before:
                    sys.exit(f"\n{error}")
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="How do llamas greet each other?")
    parser.add_argument("--address", default="localhost:50051")
    parser.add_argument("--max-tokens", type=int, default=128)
    main(**vars(parser.parse_args()))
