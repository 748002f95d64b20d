"""How much of what a JSON Schema may have, so that enforcing it keeps nobody else waiting."""

from typing import Final

from flywheel_server.engines.llama_cpp.constraints.classes import MAX_CLASS_WORK
from flywheel_server.engines.llama_cpp.constraints.numbers import BOUNDS

MAX_LENGTH: Final = 10_000
"""Maximum value of `minLength` and `maxLength`."""

MAX_COUNTS: Final = {
    "schemas": 1_000,
    "properties": 200,
    "values": 1_000,
    "inner values": 200,
    "items": 1_000,
    "patterns": 16,
    "pattern steps": 3_000,
    "units of work for classes of characters": MAX_CLASS_WORK,
    "multiples": 1_000,
    "number ranges": 64,
    "pairs in oneOf": 5_000,
}
"""How many of each a schema may have, everything within it counted.

    schemas         the whole schema, and each schema within it
    properties      the names in `properties` and `required`
    values          the values of `enum` and `const`
    inner values    the values within arrays and objects among these
    items           what `minItems`, `maxItems`, `minProperties`, `maxProperties` and the lengths of `prefixItems` add up to
    patterns        the regular expressions and formats
    pattern steps   the characters that regular expressions describe, with each counted repetition written out
    units of work   the microseconds that the classes in regular expressions take to read
    multiples       what the digits of `multipleOf` add up to
    number ranges   the schemas with any bound of a number
    pairs in oneOf  the pairs of schemas within each `oneOf`, which are compared; one `oneOf` of 100 schemas has 4,950
"""

MAX_ALTERNATIVES: Final = {
    ("pattern",): 1,
    ("multipleOf",): 1,
    ("format", "minLength", "maxLength", *BOUNDS): 8,
}
"""How many schemas with any of the keywords may apply to one value.

LLGuidance looks for all of them at once, which can take as many states as all of them have multiplied.
"""
