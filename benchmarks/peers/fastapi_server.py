"""A server with FastAPI on uvicorn, designed as Flywheel's published example: JSON for a whole answer, SSE for a stream.

python -m benchmarks.peers.fastapi_server --text TEXT --delay SECONDS
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from benchmarks.peers import bare


class Request(BaseModel):
    """The fields that the benchmarks send."""

    text: str
    max_tokens: int


class Sample(BaseModel):
    """A finished sample."""

    text: str
    generated_tokens: int
    finished: float
    finish_reason: str


class Response(BaseModel):
    """A whole answer."""

    created: float
    finished: float
    num_samples: int
    responses: list[Sample]
    prompt: str


def application(text: str, delay: float) -> FastAPI:
    """Returns the application, which streams the text in tokens of four characters, each after `delay` seconds."""
    tokens = [text[at : at + bare.TOKEN_CHARACTERS] for at in range(0, len(text), bare.TOKEN_CHARACTERS)]

    async def generate(request: Request) -> Response:
        created = time.time()
        said = ""
        for number in range(request.max_tokens):
            await asyncio.sleep(delay)
            said += tokens[number % len(tokens)]
        finished = time.time()
        sample = Sample(text=said, generated_tokens=request.max_tokens, finished=finished, finish_reason="length")
        return Response(created=created, finished=finished, num_samples=1, responses=[sample], prompt=request.text)

    async def deltas(request: Request) -> AsyncIterator[str]:
        for number in range(request.max_tokens):
            await asyncio.sleep(delay)
            delta = {"text": tokens[number % len(tokens)], "generated_tokens": number + 1}
            yield f"data: {json.dumps(delta)}\n\n"

    async def generate_deltas(request: Request) -> StreamingResponse:
        return StreamingResponse(deltas(request), media_type="text/event-stream")

    app = FastAPI()
    app.add_api_route("/generate", generate, methods=["POST"])
    app.add_api_route("/generate_deltas", generate_deltas, methods=["POST"])
    return app


def main() -> None:
    """Serves on a free port until the process ends, and prints the address."""
    chosen = bare.arguments()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    config = uvicorn.Config(
        application(chosen.text, chosen.delay), loop="uvloop", http="httptools", log_level="warning", access_log=False
    )
    print(f"ready: 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
