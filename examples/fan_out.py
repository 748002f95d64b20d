"""Asks one hundred questions, at most eight at a time, and prints the answers in the order of the questions."""

import argparse
import sys

from flywheel_client import Client

QUESTIONS = [f"What is {number} times {number}?" for number in range(1, 101)]


def main(address: str) -> int:
    """Prints the answers, and returns how many questions have none."""
    failed = 0
    with Client(address, timeout=60) as client:
        # The results come as the calls end. A call that failed, although the client has tried it several times, has an error.
        results = client.generate_many(QUESTIONS, concurrency=8, max_tokens=16, temperature=0.0)
        for result in sorted(results, key=lambda result: result.position):
            print(QUESTIONS[result.position], result.error or result.response.responses[0].text)
            failed += result.error is not None
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051")
    failed = main(parser.parse_args().address)
    sys.exit(f"{failed} of {len(QUESTIONS)} calls failed" if failed else 0)
