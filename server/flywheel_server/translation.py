"""Translates between protobuf and the server's own messages: pure functions, one for each direction and message."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Final

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server.engines.base import EngineModel, EngineStats, PromptToken
from flywheel_server.messages import (
    MAX_CHOICES,
    MAX_CONSTRAINT_BYTES,
    MAX_EOS_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOP_BYTES,
    MAX_STOP_SEQUENCES,
    PROMPT_FIELDS,
    SERVER_FIELDS,
    GenerationRequest,
    GenerationResponseSample,
    RequestLimits,
    Token,
)
from flywheel_server.request_checks import checked_request
from flywheel_server.unknown_fields import refuse_unknown_fields

_ELEMENTS: Final[dict[str, Callable[[Any, RequestLimits], object]]] = {
    "eos_token_ids": lambda ids, _: tuple(ids[: MAX_EOS_TOKEN_IDS + 1]),
    "stop": lambda texts, _: tuple(texts[: MAX_STOP_SEQUENCES + 1]),
    "messages": lambda messages, _: tuple(
        {"role": message.role, "content": message.content} for message in messages[: MAX_MESSAGES + 1]
    ),
    "prompt_token_ids": lambda ids, limits: tuple(ids[: limits.context_tokens + 1]),
    "logit_bias": lambda biases, _: dict(islice(biases.items(), MAX_LOGIT_BIAS + 1)),
    "choices": lambda choices, _: tuple(choices.texts[: MAX_CHOICES + 1]),
}
"""The elements of each field that has several. A message may have millions: one more than the most is enough to refuse it."""


def request_from_proto(message: pb.GenerationRequest, limits: RequestLimits) -> GenerationRequest:
    """Returns the checked request, with defaults for unset fields.

    Raises:
        UnknownFieldError: The request has fields that this server does not know.
        InvalidRequestError: Fields are out of range, or the engine does not honour them; holds every violation.
    """
    # A message with too many of these is refused anyway. To search all of them would take too long.
    if len(message.messages) <= MAX_MESSAGES and len(message.logit_bias) <= MAX_LOGIT_BIAS:
        refuse_unknown_fields(message)
    return _checked(message, limits, PROMPT_FIELDS)


def prompt_from_proto(message: pb.TokenizeRequest, limits: RequestLimits) -> GenerationRequest:
    """Returns a request for one token after the prompt. Raises the errors of `request_from_proto`."""
    messages = message.messages[: MAX_MESSAGES + 1]
    if len(messages) <= MAX_MESSAGES:
        refuse_unknown_fields(message)
    prompt_fields = [field.name for field in message.DESCRIPTOR.fields]
    return _checked(pb.GenerationRequest(text=message.text, messages=messages, max_tokens=1), limits, prompt_fields)


def _checked(message: pb.GenerationRequest, limits: RequestLimits, prompt_fields: Sequence[str]) -> GenerationRequest:
    # ListFields has a field with presence if it is set, and any other field if it is not zero. It is cheaper than
    # MessageToDict, and than asking for each field.
    fields: dict[str, Any] = {}
    for field, value in message.ListFields():
        elements = _ELEMENTS.get(field.name)
        fields[field.name] = value if elements is None else elements(value, limits)
    return checked_request(limits, fields, prompt_fields)


# There is a message for each call and each token. To fill it field by field costs less than keyword arguments.


def sample_to_proto(sample: GenerationResponseSample) -> pb.GenerationResponseSample:
    """Returns the sample as a message."""
    message = pb.GenerationResponseSample()
    _fill_sample(message, sample)
    return message


def _fill_sample(message: pb.GenerationResponseSample, sample: GenerationResponseSample) -> None:
    message.text = sample.text
    message.generated_tokens = sample.generated_tokens
    message.finished = sample.finished
    message.finish_reason = sample.finish_reason
    message.index = sample.index
    message.prompt_tokens = sample.prompt_tokens
    message.stop_sequence = sample.stop_sequence
    message.seed = sample.seed
    if sample.tokens:
        _add_tokens(message, sample.tokens)


def _add_tokens(message: pb.GenerationResponseSample | pb.GenerationDelta, tokens: Sequence[Token]) -> None:
    for token in tokens:
        added = message.tokens.add(id=token.id, text=token.text, logprob=token.logprob)
        for likely in token.likeliest:
            added.likeliest.add(id=likely.id, text=likely.text, logprob=likely.logprob)


def response_to_proto(
    request: GenerationRequest, created: float, samples: Sequence[GenerationResponseSample]
) -> pb.GenerationResponse:
    """Returns the response to a request that was accepted at `created`, with its samples in any order, as a message.

    The fields are those of `GenerationResponse.of`. To make that model first would cost more than the message.
    """
    message = pb.GenerationResponse()
    message.created = created
    message.finished = max([sample.finished for sample in samples])
    message.num_samples = len(samples)
    message.prompt = request.text
    message.prompt_tokens = samples[0].prompt_tokens
    for sample in sorted(samples, key=lambda sample: sample.index):
        _fill_sample(message.responses.add(), sample)
    return message


def delta_to_proto(index: int, text: str, generated_tokens: int, tokens: Sequence[Token] = ()) -> pb.GenerationDelta:
    """Returns a delta as a message."""
    message = pb.GenerationDelta()
    message.index = index
    message.text = text
    message.generated_tokens = generated_tokens
    if tokens:
        _add_tokens(message, tokens)
    return message


def last_delta_to_proto(sample: GenerationResponseSample, text: str, tokens: Sequence[Token] = ()) -> pb.GenerationDelta:
    """Returns the last delta of a sample. `text` and `tokens` are the parts of the sample that were not sent yet."""
    message = delta_to_proto(sample.index, text, sample.generated_tokens, tokens)
    message.finished = sample.finished
    message.finish_reason = sample.finish_reason
    message.prompt_tokens = sample.prompt_tokens
    message.stop_sequence = sample.stop_sequence
    message.seed = sample.seed
    return message


def tokens_to_proto(tokens: Sequence[PromptToken]) -> pb.TokenizeResponse:
    """Returns the tokens of a prompt as a message."""
    response = pb.TokenizeResponse(prompt_tokens=len(tokens))
    for token in tokens:
        response.tokens.add(id=token.id, text=token.text)
    return response


def model_to_proto(model: EngineModel, limits: RequestLimits) -> pb.Model:
    """Returns the model, the limits of a request to it, and the defaults of unset fields as a message."""
    fields = GenerationRequest.model_fields
    return pb.Model(
        name=model.name,
        engine=model.engine,
        context_tokens=model.context_tokens,
        limits=pb.Limits(
            max_text_bytes=limits.max_text_bytes,
            max_num_samples=limits.max_num_samples,
            max_eos_token_ids=MAX_EOS_TOKEN_IDS,
            max_stop_sequences=MAX_STOP_SEQUENCES,
            max_stop_bytes=MAX_STOP_BYTES,
            max_messages=MAX_MESSAGES,
            max_logit_bias=MAX_LOGIT_BIAS,
            max_constraint_bytes=MAX_CONSTRAINT_BYTES,
            max_choices=MAX_CHOICES,
            max_logprobs=MAX_LOGPROBS,
        ),
        defaults=pb.Defaults(**{stated.name: fields[stated.name].default for stated in pb.Defaults.DESCRIPTOR.fields}),
        penalizes_prompt=model.penalizes_prompt,
        prompt_format=model.prompt_format,
        supported_fields=[name for name in fields if name in model.supported_fields | SERVER_FIELDS],
        exact_seeds=model.exact_seeds,
    )


def stats_to_proto(stats: EngineStats, active: int, queued: int) -> pb.Stats:
    """Returns the statistics of the engine and of this server's generation calls as a message."""
    return pb.Stats(backlog=stats.backlog, num_total_runners=stats.num_total_runners, active=active, queued=queued)
