"""Gets an object instead of text: the answer is JSON that is valid for a pydantic model. Needs `pip install pydantic`."""

import argparse
import sys
from typing import Annotated, Literal

from flywheel_client import Client, FlywheelError
from pydantic import BaseModel, Field


class Llama(BaseModel):
    """Bounded lengths keep the document short: a small model may otherwise go on until max_tokens."""

    name: str = Field(max_length=20)
    colour: Literal["white", "brown", "black"]
    age: int = Field(ge=0, le=30)
    hobbies: list[Annotated[str, Field(max_length=20)]] = Field(max_length=3)


def main(address: str, question: str, max_tokens: int) -> None:
    """Prints the object. Exits with 1 if the call fails, or if the document is not complete."""
    try:
        with Client(address, timeout=60) as client:
            response = client.generate_all(question, max_tokens=max_tokens, json_schema=Llama.model_json_schema())
    except FlywheelError as error:
        sys.exit(str(error))
    (sample,) = response.responses
    if sample.finish_reason != "stop":  # such as "length": the text is only the beginning of a document
        sys.exit(f"incomplete after {sample.generated_tokens} tokens, finish reason {sample.finish_reason}: raise --max-tokens")
    print(repr(Llama.model_validate_json(sample.text)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="Describe a llama as JSON, with name, colour, age and hobbies.")
    parser.add_argument("--address", default="localhost:50051")
    parser.add_argument("--max-tokens", type=int, default=256)
    main(**vars(parser.parse_args()))
