"""Turns the constraint of a request into a grammar for llama.cpp, or refuses it.

llama.cpp generates free text if it cannot read a constraint. So LLGuidance checks each grammar here first, in the version that
llama.cpp contains. llama.cpp builds the grammar, and works with it, in the loop that all slots share: the limits here bound
how long that keeps other callers waiting.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits

from flywheel_server.engines.base import InvalidFieldError
from flywheel_server.engines.llama_cpp.constraints.constraint_problem import ConstraintProblemError
from flywheel_server.engines.llama_cpp.constraints.disjoint import Schema
from flywheel_server.engines.llama_cpp.constraints.json_schema import SchemaReader
from flywheel_server.engines.llama_cpp.constraints.json_values import read_object
from flywheel_server.engines.llama_cpp.constraints.probe import SCHEMA_FUEL, TOO_COSTLY, has_few_states, trial_problem
from flywheel_server.engines.llama_cpp.constraints.regexes import lark_regex
from flywheel_server.messages import FieldViolation

MAX_GRAMMAR_SIZE: Final = 4_000
"""Maximum number of symbols in the rules that LLGuidance makes of a constraint. It needs 2 milliseconds for 1,000."""

MAX_LEXER_FUEL: Final = 50_000
"""Maximum work of LLGuidance on the regular expressions of a constraint before it begins. It needs 1 millisecond for 10,000."""

MAX_LOCATING_CHECKS: Final = 50
"""How many schemas are checked one by one to find the one that LLGuidance refuses."""

REGEX_TRIAL_TOKENS: Final = 512
"""Tokens of the trial of a regular expression that may have many states; fewer if they take too long."""

PATTERN_TRIAL_TOKENS: Final = 128
"""Tokens of the trials of such expressions in a schema, all trials for a request together."""

SCHEMA_TRIALS: Final = (8, 4)
"""Tokens of a trial of a whole schema, and how many trials there are."""

MAX_LARGE_PATTERNS: Final = 4
"""Maximum number of regular expressions in a schema that may have many states."""

UNSATISFIABLE: Final = "Unsatisfiable schema"
"""What LLGuidance says of a schema that allows no value, before the reason. A reason about texts has parts of the grammar."""

PREFIX: Final = '%llguidance {"no_forcing": true}\nstart: '
"""Tells llama.cpp to give the grammar to LLGuidance, which must not force tokens.

If only one text can follow, LLGuidance would force the tokens that llama.cpp makes of it, and let llama.cpp make tokens of the
whole rest of that text at each step. And llama.cpp makes a special token of `<|im_end|>`, which the grammar then refuses.
"""

JSON_OPTIONS: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""No other whitespace: small models would generate line breaks without end."""


def grammar_of(json_schema: str | None, regex: str | None, choices: Sequence[str] | None) -> str:
    """Returns the grammar for the one constraint that is set; empty if none is. Takes at most 0.1 s of CPU time.

    Sizes are not checked here: `GenerationRequest` bounds them. Raises `InvalidFieldError` if the constraint cannot be read,
    cannot be enforced, or would keep other callers waiting.
    """
    if json_schema:
        return _checked("json_schema", json_schema, _schema_grammar)
    if regex:
        return _checked("regex", regex, _regex_grammar)
    if choices:
        return _choices_grammar(choices)
    return ""


def _schema_grammar(text: str) -> str:
    reader = SchemaReader()
    root = reader.read(read_object(text))
    grammar = _json_grammar(root, reader.definitions)
    if problem := _problem(grammar):
        # A schema comes after the schemas within it, so the first one that fails is the one to name.
        for pointer, schema in list(reader.schemas.items())[:MAX_LOCATING_CHECKS]:
            if schema is not False and (its_problem := _problem(_json_grammar(schema, reader.definitions))):
                raise ConstraintProblemError(its_problem, pointer)
        raise ConstraintProblemError(problem)
    _check_texts(reader.texts)
    if problem := trial_problem(grammar, *SCHEMA_TRIALS, SCHEMA_FUEL):
        raise ConstraintProblemError(problem)
    return grammar


def _check_texts(texts: dict[str, dict[str, Any]]) -> None:
    """Raises `ConstraintProblemError` if a pattern has too many states, or too many patterns have many."""
    large = {
        pointer: text
        for pointer, text in texts.items()
        if text.keys() != {"type", "pattern"} or not has_few_states(text["pattern"])
    }
    for number, (pointer, text) in enumerate(large.items()):
        if number == MAX_LARGE_PATTERNS:
            raise ConstraintProblemError(TOO_COSTLY, pointer)
        if problem := trial_problem(_json_grammar(text, {}), PATTERN_TRIAL_TOKENS // len(large)):
            raise ConstraintProblemError(problem, pointer)


def _json_grammar(schema: Schema, definitions: dict[str, Schema]) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"allOf": [False]}
    document: dict[str, Any] = {"x-guidance": JSON_OPTIONS, **schema}
    if definitions:
        document["$defs"] = definitions
    return f"{PREFIX}%json {json.dumps(document)}"


def _regex_grammar(regex: str) -> str:
    grammar = f"{PREFIX}{lark_regex(regex)}"
    if problem := _problem(grammar) or trial_problem(grammar, 1 if has_few_states(regex) else REGEX_TRIAL_TOKENS):
        raise ConstraintProblemError(problem)
    return grammar


def _choices_grammar(choices: Sequence[str]) -> str:
    # The name of a terminal is in capitals. LLGuidance handles the texts of a terminal as one regular expression.
    grammar = f"{PREFIX}TEXT\nTEXT: {' | '.join(json.dumps(text) for text in choices)}"
    if problem := _problem(grammar) or trial_problem(grammar, 1):
        raise InvalidFieldError("choices", str(ConstraintProblemError(problem)))
    return grammar


def _checked(field: str, text: str, make: Callable[[str], str]) -> str:
    try:
        return make(text)
    except ConstraintProblemError as error:
        further = [FieldViolation(field, str(each)) for each in error.further]
        raise InvalidFieldError(field, str(error), further) from None


def _problem(grammar: str) -> str | None:
    """Returns what is wrong with a grammar, or None."""
    limits = LLParserLimits(initial_lexer_fuel=MAX_LEXER_FUEL, max_grammar_size=MAX_GRAMMAR_SIZE)
    message = LLMatcher.validate_grammar(grammar, limits=limits)
    if not message:
        return None
    if "limit" in message or "fuel" in message or "too many expressions" in message:
        return TOO_COSTLY
    if UNSATISFIABLE in message:
        reason = message.partition(UNSATISFIABLE)[2].splitlines()[0]
        return "allows no value" if "Regex" in reason else f"allows no value{reason}"
    # The first line, or the one that says what a regular expression has wrong. Pieces of the grammar come before and after it.
    lines = message.splitlines()
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return re.sub(r'^at \d+\(\d+\): |failed to compile JSON schema: |invalid regex ".*" \(in regex\): ', "", line)
