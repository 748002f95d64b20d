"""Chats at the terminal: sends the conversation so far with each question. Ctrl-C ends an answer, Ctrl-D the chat."""

import argparse
from contextlib import suppress

from flywheel_client import Client, FlywheelError


def answer(client: Client, conversation: str) -> str:
    """Prints the answer while it is generated, and returns it. Leaving the `with` block cancels the call on the server."""
    text = ""
    try:
        # max_input_tokens drops the beginning of a conversation that has grown longer than that.
        with client.generate_deltas(conversation, max_tokens=256, max_input_tokens=1024, stop=["\nUser:"]) as deltas:
            for delta in deltas:
                print(delta.text, end="", flush=True)
                text += delta.text
    except KeyboardInterrupt:
        print(" (interrupted)", end="")
    except FlywheelError as error:
        print(f" ({error})", end="")
    print()
    return text


def main(address: str) -> None:
    """Reads questions until the end of standard input."""
    conversation = ""
    with Client(address, timeout=60) as client, suppress(EOFError, KeyboardInterrupt):
        while True:
            conversation += f"User: {input('> ')}\nAssistant:"
            conversation += f"{answer(client, conversation)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051")
    main(parser.parse_args().address)
