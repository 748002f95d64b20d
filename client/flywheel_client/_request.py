"""Building the request of a generation from keyword arguments."""

from collections.abc import Iterable
from typing import Required, TypedDict, Unpack

from flywheel_proto.v1 import generation_pb2


class GenerationFields(TypedDict, total=False):
    """The fields of a GenerationRequest besides its text, as keyword arguments.

    None, like leaving the argument out, leaves the field unset, so that the server's default holds; an explicit 0
    arrives as 0. The server checks the ranges, which `Client.model()` tells, and reports every violation at once.
    """

    max_tokens: Required[int]
    """The most tokens to generate for each sample."""

    eos_token_ids: Iterable[int] | None
    """Token ids that end a sample, besides the model's own end-of-generation tokens."""

    max_input_tokens: int | None
    """The most prompt tokens to read: of a longer prompt the last ones are kept. 0 keeps the whole prompt."""

    num_samples: int | None
    """How many independent samples to generate. Default: 1."""

    stop: Iterable[str] | None
    """Stop sequences: the first to appear ends the sample and is not part of its text."""

    temperature: float | None
    """Divides the logits before sampling; 0 always takes the likeliest token. Default: 1.0."""

    top_k: int | None
    """Samples only from the top_k likeliest tokens; 0 does not restrict. Default: 50."""

    top_p: float | None
    """Samples only from the likeliest tokens whose probabilities add up to top_p; 1 does not restrict. Default: 1.0."""

    presence_penalty: float | None
    """Lowers the logit of every token that occurs in the text so far; -2 to 2. Default: 0.0."""

    frequency_penalty: float | None
    """Lowers the logit of a token for each time it occurs in the text so far; -2 to 2. Default: 0.0."""


def generation_request(text: str, **fields: Unpack[GenerationFields]) -> generation_pb2.GenerationRequest:
    """Returns the request with these fields; those that are None stay unset.

    Raises:
        TypeError: A field has the wrong type, is not a field of the contract, or max_tokens is missing.
        ValueError: A value cannot be put into its field: an integer beyond 32 bits, or a text that is not Unicode.
    """
    if fields.get("max_tokens") is None:
        raise TypeError("max_tokens is required")
    request = generation_pb2.GenerationRequest()
    for name, value in {"text": text, **fields}.items():
        if value is not None:
            _set(request, name, value)
    return request


def _set(request: generation_pb2.GenerationRequest, name: str, value: object) -> None:
    if name not in generation_pb2.GenerationRequest.DESCRIPTOR.fields_by_name:
        raise TypeError(f"{name} is not a field of GenerationRequest")
    repeated = hasattr(getattr(request, name), "extend")
    if repeated and isinstance(value, str):
        # A text is a sequence of texts: without this, stop="END" would mean three stop sequences.
        raise TypeError(f"{name} must be a sequence, not one text")
    try:
        if repeated:
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)
    except UnicodeError as error:
        raise ValueError(f"{name} cannot be encoded in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except TypeError as error:
        raise TypeError(f"{name} has the wrong type: {error}") from error
