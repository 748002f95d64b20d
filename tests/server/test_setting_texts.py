"""How variables and flags are read: every setting of a server and of a deployment, written in every way."""

import os
from typing import Any

import pytest
from flywheel_server.deployment.gateway_settings import gateway_settings
from flywheel_server.deployment.settings import DEPLOY_PREFIX, EXCLUDED_SETTINGS, Deployment, configured
from flywheel_server.setting_texts import NONE, choices
from flywheel_server.settings import PREFIX, Settings, default_text, flag, parse

from tests.deployment.conftest import KEY

PROTECTING = ("api_keys", "api_keys_file", "tls_client_ca")
"""The settings that say who may call."""

OTHERS = [name for name in Settings.model_fields if name not in PROTECTING]
BLANKS = ("", " ", "\t \n")
WRONG = "\x1b no such value"
ANY_TEXT = ("model", "api_keys_file", "tls_cert", "tls_key", "tls_client_ca", "modal_app", "modal_class", "modal_environment")
"""Settings for which any text is valid until it is used. `modal_gpu` takes any text too, because a GPU may be new."""

CONVERTED: dict[bool, tuple[str, ...]] = {
    True: ("true", "TRUE", "True", "1", "yes", "Yes", "on", "ON"),
    False: ("false", "FALSE", "0", "no", "NO", "off"),
}


@pytest.fixture(autouse=True)
def without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the message about wrong settings."""
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def texts_of(settings: type[Settings] | type[Deployment], name: str) -> list[tuple[str, Any]]:
    """Returns texts that the setting takes, each with the value that it stands for."""
    field = settings.model_fields[name]
    if field.annotation is bool:
        return [(text, value) for value, texts in CONVERTED.items() for text in texts]
    if found := choices(field):
        return [(text, choice) for choice in found for text in (choice, choice.upper(), choice.title())]
    return [(default_text(field), field.default)] if default_text(field) else []


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_empty_variables_count_as_not_set(blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Settings()
    for name in OTHERS:
        monkeypatch.setenv(variable(name), blank)
        assert Settings() == expected, name
    assert parse([]) == expected
    monkeypatch.setenv(variable("max_queued"), blank)
    assert parse(["--max-queued", "5"]).max_queued == 5


@pytest.mark.parametrize("blank", [*BLANKS, ",", " , ,"], ids=ascii)
@pytest.mark.parametrize("name", PROTECTING)
def test_settings_that_say_who_may_call_must_not_be_empty(
    name: str, blank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "," in blank and name != "api_keys":
        return  # that may be the name of a file
    monkeypatch.setenv(variable(name), blank)
    said = refusal_of(capsys)
    assert variable(name) in said
    assert "must hold" in said
    if flag(name):
        assert flag(name) in said


def test_text_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    undecodable = b"weights-\xff.gguf".decode(errors="surrogateescape")
    for name in Settings.model_fields:
        with monkeypatch.context() as patch:
            patch.setenv(variable(name), undecodable)
            said = refusal_of(capsys)
        assert f"{variable(name)}" in said
        assert "must be text in UTF-8" in said
        if flag(name):
            assert "must be text in UTF-8" in refusal_of(capsys, flag(name), undecodable)
    for name in Deployment.model_fields:
        with pytest.raises(ValueError, match=f"{DEPLOY_PREFIX}{name.upper()}: must be text in UTF-8"):
            configured({f"{DEPLOY_PREFIX}{name.upper()}": undecodable})


def test_keys_with_a_comma_too_many_protect_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_API_KEYS", f" {KEY} ,, {KEY[::-1]},")
    assert [key.get_secret_value() for key in parse([]).api_keys] == [KEY, KEY[::-1]]
    assert len(gateway_settings().api_keys) == 2


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_flag_is_a_mistake(blank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag(name) for name in Settings.model_fields if flag(name)]
    said = refusal_of(capsys, *(word for each in flags for word in (each, blank)))
    for name in filter(flag, Settings.model_fields):
        assert f"{flag(name)} ({variable(name)}):  must not be empty" in said
    monkeypatch.setenv("FLYWHEEL_MAX_QUEUED", "7")
    assert "--max-queued" in refusal_of(capsys, "--max-queued", blank)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_spaces_and_in_a_choice_upper_case_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, value in texts_of(Settings, name):
        for written in (text, f" {text}\t"):
            monkeypatch.setenv(variable(name), written)
            assert getattr(Settings(), name) == value, written


def test_flags_are_read_as_variables_are() -> None:
    found = parse(["--log-format", " JSON ", "--reflection", "OFF", "--max-queued", " 5", "--modal-gpu", "l40s "])
    assert (found.log_format, found.reflection, found.max_queued, found.modal_gpu) == ("json", False, 5, "L40S")


def test_wrong_values_are_answered_with_flag_variable_and_what_is_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in Settings.model_fields if name not in (*ANY_TEXT, "modal_gpu")]
    for name in names:
        monkeypatch.setenv(variable(name), WRONG)
    said = refusal_of(capsys)
    assert WRONG not in said
    for name in names:
        (line,) = [line for line in said.splitlines() if f"{variable(name)}:" in line or f"({variable(name)}):" in line]
        assert flag(name) in line
        field = Settings.model_fields[name]
        bounds = [str(getattr(one, bound)) for one in field.metadata for bound in ("ge", "le") if hasattr(one, bound)]
        for accepted in [*choices(field), *bounds[-2:]]:
            assert accepted in line
        if field.annotation is bool:
            assert "true or false" in line
        assert any(word in line for word in ("accepted: ", "Input should be '", "must be", "JSON")), line


def test_which_of_several_keys_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLYWHEEL_API_KEYS", f"{KEY},short")
    assert "FLYWHEEL_API_KEYS:  number 2  must be at least 16" in refusal_of(capsys)


def test_numbers_are_read_as_python_writes_them_and_an_integer_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--max-queued", "1_000", "--drain-timeout", "1e2"]).max_queued == 1000
    assert parse(["--drain-timeout", "1e2"]).drain_timeout == 100
    for text in ("1e3", "0x10", "1.5", "10s", "nan", "inf"):
        assert "a whole number from 0 to 2147483647" in refusal_of(capsys, "--max-queued", text)
    for text in ("10s", "nan", "inf", "1,5"):
        assert "a number from 0 to 2147483" in refusal_of(capsys, "--drain-timeout", text)


@pytest.mark.parametrize("word", [NONE, NONE.upper(), f" {NONE.title()} "])
def test_a_word_asks_for_no_value(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["--modal-gpu", word]).modal_gpu is None
    monkeypatch.setenv("FLYWHEEL_MODAL_ENVIRONMENT", "staging")
    assert parse(["--modal-environment", word]).modal_environment == ""
    of_deployment = ("FLYWHEEL_DEPLOY_GATEWAY_MAX_CONTAINERS", "FLYWHEEL_DEPLOY_MODEL_MEMORY")
    found = configured({"FLYWHEEL_MODAL_GPU": word, **dict.fromkeys(of_deployment, word)})
    assert found.server.modal_gpu is None
    assert (found.deployment.gateway_max_containers, found.deployment.model_memory) == (None, None)
    assert configured(found.environment) == found


OF_DEPLOYMENT: dict[str, tuple[type[Settings] | type[Deployment], str]] = {
    **{f"{DEPLOY_PREFIX}{name.upper()}": (Deployment, name) for name in Deployment.model_fields},
    **{variable(name): (Settings, name) for name in Settings.model_fields if name not in EXCLUDED_SETTINGS},
}


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_empty_variables_count_as_not_set_for_a_deployment(blank: str) -> None:
    expected = configured({})
    for name in OF_DEPLOYMENT:
        found = configured({name: blank})
        assert found == expected, name
    assert configured(dict.fromkeys([*OF_DEPLOYMENT, *map(variable, EXCLUDED_SETTINGS)], blank)) == expected


@pytest.mark.parametrize("name", OF_DEPLOYMENT)
def test_spaces_and_upper_case_make_no_difference_for_a_deployment(name: str) -> None:
    settings, field = OF_DEPLOYMENT[name]
    if field == "drain_timeout":
        return  # its default is too long for Modal
    for text, value in texts_of(settings, field):
        found = configured({name: f" {text}\n"})
        assert getattr(found.deployment if settings is Deployment else found.server, field) == value
        assert configured(found.environment) == found


def test_weights_may_be_written_in_upper_case() -> None:
    name = "smollm2-135m-instruct-q8_0"
    assert configured({"FLYWHEEL_DEPLOY_WEIGHTS": name.upper()}).deployment.weights == name


@pytest.mark.parametrize("name", OF_DEPLOYMENT)
def test_a_wrong_value_of_a_deployment_is_answered_with_the_variable_and_what_is_accepted(name: str) -> None:
    if OF_DEPLOYMENT[name][1] in (*ANY_TEXT, "routing_region"):
        return
    with pytest.raises(ValueError, match=name) as refused:
        configured({name: WRONG})
    (line,) = [line for line in str(refused.value).splitlines() if name in line]
    assert any(word in line for word in ("accepted: ", "Input should be '", "must be", "Known: ")), line
