"""What the server costs: tokens/s of concurrent clients over gRPC, against as many threads that call llama.cpp directly.

    python -m benchmarks.embedded

Both sides have a process and a loaded model of their own, with the settings of the server, and take turns; the one whose turn
it is not sleeps. The ratio of a row is the median over the rounds.
"""

import asyncio
import statistics
import threading
import time
from typing import Final

from flywheel_client import AsyncClient
from flywheel_server.cores import usable_cores
from flywheel_server.engines.embedded import default_model
from flywheel_server.engines.llama import Chunk, Llama

from benchmarks.serving import flywheel_server

CONCURRENCY: Final = (1, 4, 8)
ROUNDS: Final = 7
MAX_TOKENS: Final = 96
# The model does not end this before MAX_TOKENS, so that both sides make the same number of tokens in the same batches.
PROMPT: Final = "<|im_start|>Series {}: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"


def main() -> None:
    """Measures, and prints a table."""
    llama = Llama(default_model(), context_tokens=8192, slots=8, threads=usable_cores(), batch_tokens=32, verbosity=1)
    print(f"{'clients':>8} {'direct tokens/s':>16} {'gRPC tokens/s':>14} {'ratio':>6}   (ratio of each round)")
    with flywheel_server() as address:
        for concurrency in CONCURRENCY:
            direct, served = [], []
            for number in range(ROUNDS):
                direct.append(direct_speed(llama, concurrency, number))
                served.append(asyncio.run(served_speed(address, concurrency, number)))
            ratios = [over / under for over, under in zip(served, direct, strict=True)]
            print(
                f"{concurrency:>8} {statistics.median(direct):>16.0f} {statistics.median(served):>14.0f} "
                f"{statistics.median(ratios):>6.2f}   ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
            )


def direct_speed(llama: Llama, concurrency: int, number: int) -> float:
    """Returns the tokens/s of so many threads that call llama.cpp as its own documentation does."""
    tokens = [0] * concurrency

    def complete(index: int) -> None:
        def count(chunk: Chunk) -> bool:
            if usage := chunk.get("usage"):
                tokens[index] = usage["completion_tokens"]
            return False

        prompt = PROMPT.format(number * 100 + index)
        llama.complete({"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.8, "stream": True}, count)

    threads = [threading.Thread(target=complete, args=(index,)) for index in range(concurrency)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(tokens) / (time.perf_counter() - start)


async def served_speed(address: str, concurrency: int, number: int) -> float:
    """Returns the tokens/s of so many clients that read the deltas, each with a connection of its own."""

    async def read(client: AsyncClient, index: int) -> int:
        tokens = 0
        prompt = PROMPT.format(number * 100 + index)
        async with client.generate_deltas(prompt, max_tokens=MAX_TOKENS, temperature=0.8) as deltas:
            async for delta in deltas:
                tokens = delta.generated_tokens
        return tokens

    clients = [AsyncClient(address) for _ in range(concurrency)]
    await asyncio.gather(*(client.model() for client in clients))
    start = time.perf_counter()
    tokens = await asyncio.gather(*(read(client, index) for index, client in enumerate(clients)))
    seconds = time.perf_counter() - start
    for client in clients:
        await client.close()
    return sum(tokens) / seconds


if __name__ == "__main__":
    main()
