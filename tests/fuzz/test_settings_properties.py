"""Whatever text the settings are given, they are read, or refused with a message that names the setting."""

import io
from contextlib import redirect_stderr

from flywheel_server.settings import Settings, flag, parse
from hypothesis import given
from hypothesis import strategies as st

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20) | st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "true",
        "{}",
        "[]",
        '{"text": ""}',
        "127.0.0.1:0",
        "[::1]:50051",
        ":",
        "²",
        "99999999999",
    ]
)
FLAGS = [flag(name) for name in Settings.model_fields if flag(name)]


@given(name=st.sampled_from(FLAGS), text=TEXTS)
def test_any_text_as_a_flag(name: str, text: str) -> None:
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            read: Settings | SystemExit = parse([f"{name}={text}"])
        except SystemExit as ended:
            read = ended
    if isinstance(read, SystemExit):
        assert read.code == 2
        assert name in said.getvalue()
