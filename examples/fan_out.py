"""Asks one hundred questions, at most eight at a time, and prints the answers in the order of the questions."""

import argparse
import asyncio
import sys

from flywheel_client import AsyncClient, FlywheelError

QUESTIONS = [f"What is {number} times {number}?" for number in range(1, 101)]
MAX_CONCURRENT = 8


async def ask(client: AsyncClient, question: str, places: asyncio.Semaphore) -> str | FlywheelError:
    """Returns the answer, or the error of a call that failed although the client has tried it several times."""
    async with places:
        try:
            response = await client.generate_all(question, max_tokens=16, temperature=0.0)
        except FlywheelError as error:
            return error
    return response.responses[0].text


async def main(address: str) -> int:
    """Prints the answers, and returns how many questions have none."""
    places = asyncio.Semaphore(MAX_CONCURRENT)
    async with AsyncClient(address, timeout=60) as client:
        answers = await asyncio.gather(*(ask(client, question, places) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer}")
    return sum(isinstance(answer, FlywheelError) for answer in answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051")
    failed = asyncio.run(main(parser.parse_args().address))
    sys.exit(f"{failed} of {len(QUESTIONS)} calls failed" if failed else 0)
