"""The keywords of JSON Schema that a request's schema may have."""

from typing import Final

SUPPORTED_KEYWORDS: Final = {
    "type": "a type or several: null, boolean, integer, number, string, array, object",
    "enum": "values, of which the document is one. Only `type` may stand beside it",
    "const": "the value. Only `type` may stand beside it",
    "anyOf": "schemas, of which the document matches one. No other constraint may stand beside it",
    "oneOf": "as `anyOf`, with at most 100 schemas. They have different types or values, or require a property with different "
    "`const` or `enum`",
    "allOf": "one schema. No other constraint may stand beside it",
    "$ref": "a place in the same schema: `#` or `#/` and a JSON pointer. No other constraint may stand beside it",
    "$defs": "schemas for `$ref`",
    "definitions": "the same, in drafts before 2019-09",
    "properties": "schemas of properties, which come in this order. A name may not have control characters",
    "required": "names of properties. Any other named property may be left out",
    "additionalProperties": "schema of all properties without a name. If it is absent, an object that has any of `properties`, "
    "`required` and `patternProperties` has no properties but these",
    "patternProperties": "schemas of properties whose names match a pattern; no name may match two. Not beside `properties`",
    "minProperties": "a count. At most one more than there are required properties",
    "maxProperties": "a count. If it is more than 1, all named properties must be required",
    "prefixItems": "schemas of the first items",
    "items": "schema of all other items",
    "minItems": "a count",
    "maxItems": "a count",
    "minLength": "a count of characters",
    "maxLength": "a count of characters",
    "pattern": "a regular expression that is found in the text. Only its beginning may have ^, and only its end $",
    "format": "date, time, date-time, duration, email, hostname, ipv4, ipv6 or uuid. The first three not beside `pattern`",
    "minimum": "a number between -2^53 and 2^53",
    "maximum": "as `minimum`",
    "exclusiveMinimum": "as `minimum`",
    "exclusiveMaximum": "as `minimum`",
    "multipleOf": "a number above 0 whose digits, without the point, make up at most 1000",
}
"""The keywords of JSON Schema (draft 2020-12) that are enforced, and their limits. A schema with another keyword is refused.

Documents have `, ` between items, `: ` after names, and no other whitespace outside texts.
"""

ANNOTATIONS: Final = frozenset(
    {
        *("$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id"),
        *("contentEncoding", "contentMediaType", "contentSchema", "discriminator"),
    }
)
"""Keywords that are accepted and have no effect. `$schema` and `$id` may only stand at the top.

`discriminator` is OpenAPI's: it repeats what the schemas of `oneOf` say.
"""

DIALECTS: Final = frozenset(
    f"json-schema.org/{draft}/schema" for draft in ("draft/2020-12", "draft/2019-09", "draft-07", "draft-06")
)
"""Values of `$schema`, without scheme and `#`. In all of these drafts, the supported keywords mean the same."""

_REAL_DATE: Final = (
    "^(?:[0-9]{4}-(?:0[13-9]|1)|[0-9]{4}-02-(?:[01]|2[0-8])"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_NO_LEAP_SECOND: Final = ":[0-5][0-9]:[0-5][0-9](?:[.zZ+-])"

FORMATS: Final = {
    "date": _REAL_DATE,
    "time": _NO_LEAP_SECOND,
    "date-time": f"{_REAL_DATE}.*{_NO_LEAP_SECOND}",
    **dict.fromkeys(("duration", "email", "hostname", "ipv4", "ipv6", "uuid")),
}
"""The values of `format`, each with a pattern for what LLGuidance does not check: days of February, and leap seconds."""

TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")

IN_PLACE: Final = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
"""Keywords beside which no other constraint may stand. LLGuidance does not always find what both constraints allow."""
