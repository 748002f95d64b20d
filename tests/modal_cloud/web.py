"""Modal's web ingress: an HTTP request as an input of a web function."""

import pickle

from modal_proto import api_pb2

from tests.modal_cloud.calls import Calls
from tests.modal_cloud.state import Call, Function


async def fetch(calls: Calls, function: Function, path: str) -> tuple[int, dict[str, str], bytes]:
    """Makes a GET request; raises RuntimeError if the function fails before it has answered."""
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "https",
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"host", function.definition.web_url.removeprefix("https://").encode())],
        "client": ("203.0.113.1", 40_000),
    }
    arguments = api_pb2.FunctionInput(args=pickle.dumps(((scope,), {})), data_format=api_pb2.DATA_FORMAT_PICKLE)
    call = Call(function, arguments, api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC)
    request = api_pb2.Asgi(http_request=api_pb2.Asgi.HttpRequest(more_body=False))
    call.data_in.append(api_pb2.DataChunk(index=1, data_format=api_pb2.DATA_FORMAT_ASGI, data=request.SerializeToString()))
    calls.make(call)
    await call.changes.until(lambda: call.finished)
    messages = [api_pb2.Asgi.FromString(chunk.data) for chunk in call.data_out]
    starts = [message.http_response_start for message in messages if message.HasField("http_response_start")]
    if not starts:
        raise RuntimeError(f"no answer: {call.output.result.exception if call.output else ''}")
    headers = [header.decode("latin-1") for header in starts[0].headers]
    body = b"".join(message.http_response_body.body for message in messages)
    return starts[0].status, dict(zip(headers[::2], headers[1::2], strict=True)), body
