"""Settings come from flags and variables alike, and what is wrong is named."""

import pytest
from flywheel_server.engines.scripted import Script
from flywheel_server.settings import PREFIX, Settings, flag, parse


def test_the_fixed_names_and_defaults() -> None:
    settings = parse([])
    assert settings.address == "127.0.0.1:50051"
    assert settings.engine == "embedded"
    assert settings.model is None
    assert (settings.modal_app, settings.modal_class, settings.modal_environment) == ("flywheel-grpc", "Model", "")
    assert (settings.modal_gpu, settings.modal_timeout) == ("A10G", 600)
    for name in ("drain_timeout", "max_text_bytes", "max_num_samples", "log_level", "log_format"):
        assert name in Settings.model_fields


def test_a_flag_wins_over_the_variable_and_the_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_MAX_NUM_SAMPLES", "5")
    assert parse([]).max_num_samples == 5
    assert parse(["--max-num-samples", "6"]).max_num_samples == 6
    monkeypatch.setenv("FLYWHEEL_SCRIPT", '{"text": "hi", "token_delay": 0.5}')
    assert parse([]).script.token_delay == 0.5
    assert parse(["--script", '{"token_delay": 0.25}']).script.token_delay == 0.25


WRONG_RECEIVERS = (
    *(f"localhost:{port}" for port in ("99999", "65536", "0", "-1", "", "letters", "4317x", "\uff15", "9" * 5000)),
    *("", ":4317", "::1:4317", "[::1", "user@localhost:4317", "localhost:4317/path", "localhost:4317?x", "local host:4317"),
)


@pytest.mark.parametrize("url", ["http://localhost:4317", "https://collector", "http://[::1]:65535/", "http://10.0.0.1:1"])
def test_urls_of_receivers(url: str) -> None:
    assert parse(["--otlp-endpoint", url]).otlp_endpoint == url


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--max-num-samples", "none"], ["--max-num-samples", "FLYWHEEL_MAX_NUM_SAMPLES"]),
        (["--engine", "steam", "--log-level", "loud"], ["--engine", "'embedded'", "--log-level", "'debug'"]),
        (["--drain-timeout", "-1"], ["--drain-timeout"]),
        (["--script", "{"], ["--script"]),
        (["--address", "localhost"], ["--address", "HOST:PORT"]),
        (["--address", "127.0.0.1:80000"], ["--address", "65535"]),
        *((["--address", text], ["HOST:PORT", "in brackets"]) for text in ("::1:5", "http://[::1]:5", "a:\uff15", "a:-5", "")),
        *((["--otlp-endpoint", f"http://{text}"], ["--otlp-endpoint", "65535", "in brackets"]) for text in WRONG_RECEIVERS),
        (["--embedded-context", "1", "--embedded-threads", "100000"], ["--embedded-context", "--embedded-threads"]),
        (["--keepalive-time", "1e9", "--max-message-bytes", "99999999999"], ["--keepalive-time", "--max-message-bytes"]),
        (["--script", '{"text": ""}'], ["--script"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for name in names:
        assert name in message


def test_numbers_must_be_finite(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = [name for name, field in Settings.model_fields.items() if field.annotation is float]
    assert {"log_calls", "drain_timeout"} <= set(numbers)
    delays = [name for name, field in Script.model_fields.items() if field.annotation is float]
    assert "token_delay" in delays
    cases = [(flag(name), text) for name in numbers for text in ("nan", "inf", "-inf")]
    cases += [("--script", f'{{"{name}": {text}}}') for name in delays for text in ("NaN", "Infinity", "-Infinity", "1e999")]
    for name, text in cases:
        with pytest.raises(SystemExit) as left:
            parse([f"{name}={text}"])
        assert left.value.code == 2
        assert name in capsys.readouterr().err


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable, value in [("FLYWHEEL_KEEPALIVE_TIME", "soon"), ("FLYWHEEL_SCRIPT", "{")]:
        monkeypatch.setenv(variable, value)
        with pytest.raises(SystemExit):
            parse([])
        assert variable in capsys.readouterr().err


def test_help_has_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert flag(name) in text
        assert str(field.description) in text or not flag(name)
        assert f"{PREFIX}{name}".isascii()
