"""Chats at the terminal: sends the conversation so far with each question. Ctrl-C stops an answer, Ctrl-D ends the chat."""

import argparse
import signal
from contextlib import suppress

from flywheel_client import CallCancelledError, Client, FlywheelError, Message

SYSTEM = Message("system", "You answer in one or two sentences.")
MAX_HISTORY = 21  # messages; an odd number, so that the first of them is a question


def answer(client: Client, conversation: list[Message]) -> str:
    """Prints the answer while it is generated, and returns it. Ctrl-C cancels it on the server; the part that came is kept."""
    text, messages = "", [SYSTEM, *conversation[-MAX_HISTORY:]]
    with suppress(CallCancelledError), client.generate_deltas(messages=messages, max_tokens=256) as deltas:
        # A KeyboardInterrupt could leave a lock of gRPC taken, and the next call would wait for ever.
        signal.signal(signal.SIGINT, lambda *_: deltas.cancel())
        for delta in deltas:
            text += delta.text
            print(delta.text, end="", flush=True)
    print()
    return text


def main(address: str) -> None:
    """Reads questions until the end of standard input. A question whose call fails does not stay in the conversation."""
    conversation: list[Message] = []
    with Client(address, timeout=60) as client, suppress(EOFError, KeyboardInterrupt):
        while True:
            signal.signal(signal.SIGINT, signal.default_int_handler)
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
