"""What the method `tokenize` of our class on Modal returns, as plain data."""

from pydantic import BaseModel, ConfigDict

from flywheel_server.engines.base import PromptToken


class TokenizedPrompt(BaseModel):
    """The tokens of a prompt, in order."""

    model_config = ConfigDict(frozen=True)

    tokens: tuple[PromptToken, ...]
