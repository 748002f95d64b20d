"""Says in one sentence why llama.cpp could not load a model. The reason comes from its log."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_TEMPLATE_PROBLEM: Final = re.compile(r"chat template parsing error|failed to initialize chat template")
_OUT_OF_MEMORY: Final = re.compile(r"bad_alloc|to allocate|out of memory")
_REASONS: Final = (
    # For example `Error: Jinja Exception: it needs a list of tools`.
    re.compile(r"^Error: (?:Jinja Exception: )?(.+)"),
    re.compile(r"common_chat_templates_init: error: (.+)"),
    re.compile(r"chat template parsing error: (.+)"),
    re.compile(r"gguf_init_from_\w+: (.+)"),
    re.compile(r"error loading model: (?:error loading model \w+: )?(.+)"),
    re.compile(r"((?:failed|unable) to allocate .+|std::bad_alloc)"),
    re.compile(r"(failed to .+)"),
)
"""Log lines that name a reason, the most specific first."""


def load_failure(model: Path, errors: Iterable[str]) -> str:
    """Returns the error message for a model that cannot be loaded, given the lines that llama.cpp has logged as errors."""
    lines = list(errors)
    found = next((found[1] for reason in _REASONS for line in lines if (found := reason.search(line))), None)
    if found and _OUT_OF_MEMORY.search(found):
        found = (
            f"there is not enough memory for the model and its context ({found}). A smaller --embedded-context "
            "(FLYWHEEL_EMBEDDED_CONTEXT; for the Model on Modal: FLYWHEEL_MODAL_CONTEXT) needs less"
        )
    if any(map(_TEMPLATE_PROBLEM.search, lines)):
        return template_failure(model, found or "llama.cpp does not say why")
    return f"llama.cpp cannot load {model}: {found or 'its log says more, with the setting log_level=debug'}"


def template_failure(model: Path, reason: str) -> str:
    """Returns the error message for a chat template that cannot be used, which says what to do."""
    return (
        f"the chat template of {model} cannot be used: {reason}. "
        "--embedded-prompt raw (FLYWHEEL_EMBEDDED_PROMPT; for the Model on Modal: FLYWHEEL_MODAL_PROMPT) does without it"
    )
