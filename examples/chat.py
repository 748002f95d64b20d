"""Chats at the terminal: sends the conversation so far with each question. Ctrl-C stops an answer, Ctrl-D ends the chat."""

import argparse
from contextlib import suppress

from flywheel_client import Client, FlywheelError, Message

SYSTEM = Message("system", "You answer in one or two sentences.")
MAX_HISTORY = 21  # messages; an odd number, so that the first of them is a question


def answer(client: Client, conversation: list[Message]) -> str:
    """Prints the answer while it is generated, and returns it. Leaving the stream, also by Ctrl-C, cancels it on the server."""
    text, messages = "", [SYSTEM, *conversation[-MAX_HISTORY:]]
    with suppress(KeyboardInterrupt), client.generate_deltas(messages=messages, max_tokens=256) as deltas:
        for delta in deltas:
            text += delta.text  # first, because Ctrl-C may come between the two
            print(delta.text, end="", flush=True)
    print()
    return text


def main(address: str) -> None:
    """Reads questions until the end of standard input. A question whose call fails does not stay in the conversation."""
    conversation: list[Message] = []
    with Client(address, timeout=60) as client, suppress(EOFError, KeyboardInterrupt):
        while True:
            question = Message("user", input("> "))
            try:
                text = answer(client, [*conversation, question])
                conversation += [question, Message("assistant", text)]
            except FlywheelError as error:  # a model without a chat template, for example, takes no messages
                print(error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051")
    main(parser.parse_args().address)
