"""An export on the Hugging Face hub: only when asked for by name, private unless told otherwise."""

from __future__ import annotations

from pathlib import Path

from ka2l.errors import ConfigError, first_line

#: What stays at home: the annotated data, and questions of the pool.
NOT_PUSHED = ("data/*", "canary.json", "export.json")


def check_push(repo_id: str) -> None:
    """Raise ConfigError where a push could not work, before anything is written."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        named = repo_id.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise ConfigError(f"--push-to-hub {repo_id!r} is not the name of a repository", hint="Give ORG/NAME.")
    if not get_token():
        raise ConfigError(
            "there is no token for the Hugging Face hub",
            hint="Set the environment variable HF_TOKEN to one that may write, or log in: hf auth login",
        )


def push(folder: Path, repo_id: str, *, public: bool) -> str:
    """Upload adapter, card and merged weights; returns the address.

    Raises:
        ConfigError: the hub refuses, or is not reached, or holds a public repository of that name unasked.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token() or ""
    try:
        api = HfApi(token=token)
        address = str(api.create_repo(repo_id, private=not public, exist_ok=True))
        # Making it again does not change who sees it.
        is_public = not api.model_info(repo_id).private
        if is_public and not public:
            raise ConfigError(f"{repo_id} is public already", hint="Push there with --public, or to another name.")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Export from KA2L",
            ignore_patterns=list(NOT_PUSHED),
        )
    except ConfigError as error:
        error.message += f"; nothing was uploaded. The export is in {folder}"
        raise
    except Exception as error:  # whatever the hub's client meets: its own errors, the network's
        said = first_line(error).replace(token, "***") if token else first_line(error)
        raise ConfigError(
            f"the hub did not take {repo_id}: {said}",
            hint=f"The export is in {folder}. Check the name and what the token may do, and push with --overwrite.",
        ) from None
    return address
