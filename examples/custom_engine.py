"""Serves an engine of your own over gRPC: it says the prompt over and over. Its flags are those of flywheel-server."""

import asyncio
from itertools import cycle, islice

import flywheel_server as fs


class EchoEngine(fs.Engine):
    def model(self) -> fs.EngineModel:
        return fs.EngineModel("echo", engine="echo", context_tokens=8192, penalizes_prompt=False, prompt_format="raw")

    async def check(self) -> None: ...

    async def prepare(self, request: fs.GenerationRequest) -> fs.PreparedRequest:
        prompt = [ord(character) for character in request.text][-request.max_input_tokens :]
        if len(prompt) + request.max_tokens > self.model().context_tokens:
            raise fs.PromptTooLongError(len(prompt), request.max_tokens, self.model().context_tokens)
        return fs.PreparedRequest(request, prompt)

    async def generate(self, prepared: fs.PreparedRequest, sink: fs.Sink) -> None:
        request, prompt_tokens = prepared.request, len(prepared.prompt)
        sink.emit(fs.Started(prompt_tokens))
        for index in range(request.num_samples):
            sample = fs.GrowingSample(index, prompt_tokens, request.stop, sink.emit)
            for generated, token in enumerate(islice(cycle(prepared.prompt), request.max_tokens), start=1):
                await asyncio.sleep(0.001)
                if token in request.eos_token_ids:
                    sample.end("stop", generated)
                else:
                    sample.add(chr(token), generated)
                if sample.finished:
                    break
            else:
                sample.end("length", request.max_tokens)


if __name__ == "__main__":
    raise SystemExit(fs.run(EchoEngine()))
