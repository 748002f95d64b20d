"""Reads the settings of a gateway from the environment of its container, to which Modal adds the API keys of the secret.

`modal deploy` cannot read the values of a secret. So the build of the gateway's image, which has the secret, runs
`python -m flywheel_server.deployment.gateway_settings`. If a gateway would refuse the keys, the deployment fails.
"""

import os
import shlex
import sys
from typing import Final

from pydantic import ValidationError

from flywheel_server.setting_texts import places, problems_of
from flywheel_server.settings import PREFIX, Settings

KEYS_SECRET: Final = "flywheel-grpc-keys"  # noqa: S105 - its name
KEYS_VARIABLE: Final = f"{PREFIX}API_KEYS"


def gateway_settings() -> Settings:
    """Returns the settings of the environment. Raises `ValueError`, which says how to correct them, if they are wrong."""
    try:
        settings = Settings()
    except ValidationError as error:
        problems = [f"{_place(location)}: {message}" for location, message in problems_of(error, Settings)]
    else:
        if settings.api_keys:
            return settings
        problems = [f"{KEYS_VARIABLE}: must hold a key"]
    rows = "\n".join(f"  {problem}" for problem in problems)
    raise ValueError(
        f'A gateway does not start with these settings ({KEYS_VARIABLE} comes from the modal.Secret "{KEYS_SECRET}"):\n\n'
        f"{rows}\n\nTo replace the secret, run these commands, note the key for your callers, and deploy again:\n\n"
        f"{create_secret_commands(os.environ.get('MODAL_ENVIRONMENT', ''), replace=True)}"
    )


def _place(location: tuple[int | str, ...]) -> str:
    return " ".join([f"{PREFIX}{location[0]}".upper(), *places(location[1:])])


def create_secret_commands(environment: str, *, replace: bool = False) -> str:
    """Returns the shell commands that create the secret with a new key in an environment of Modal; "" is the default one."""
    options = [*(["-e", shlex.quote(environment)] if environment else []), *(["--force"] if replace else [])]
    create = " ".join(["modal secret create", *options, KEYS_SECRET, f"{KEYS_VARIABLE}=$KEY"])
    return f'  KEY=$(openssl rand -hex 32)\n  {create}\n  echo "$KEY"\n'


if __name__ == "__main__":
    try:
        gateway_settings()
    except ValueError as error:
        sys.exit(str(error))
