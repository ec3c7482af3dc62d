"""Model and adapter directories: checks that fail early and clearly, identity for fingerprints, tokenizers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ka2l.errors import ModelError, first_line
from ka2l.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_SAMPLED_BYTES = 1 << 20


class ModelConfig(Section):
    """The model under study."""

    path: str = "testbed"
    """A directory, a Hugging Face hub id, or ``testbed`` for the built-in closed-book model."""
    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16; ``auto`` is what the checkpoint was saved in."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust the model's authors."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"path"})

    @property
    def source(self) -> str:
        """What loads the model, in one string: a folder, a hub id, or ``id@revision``; see `split_source`."""
        return self.path if self.revision is None or is_directory(self.path) else f"{self.path}@{self.revision}"


class ModelState(NamedTuple):
    """What a round asks: the base model, with an adapter from the second round on, or a model that training wrote."""

    model: ModelConfig
    adapter: str | None = None
    """Local folder of the adapter on ``model``; None where the model stands for itself."""

    def canary(self) -> dict[str, Any] | None:
        """What the canary found when the state was trained; None for the base model."""
        file = Path(self.adapter or self.model.path) / "canary.json"
        return json.loads(file.read_text()) if file.is_file() else None


def is_directory(path: str) -> bool:
    """Whether ``path`` means a local folder rather than a hub id; a path that only looks local must exist."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    found = Path(path).expanduser().is_dir()
    if looks_local and not found:
        raise ModelError(f"model directory {path} does not exist", hint="Check model.path.")
    return found


def split_source(source: str) -> tuple[str, str | None]:
    """Folder or hub id, and the revision of a hub id, of what `ModelConfig.source` gives."""
    if source.startswith((".", "/", "~")) or Path(source).is_dir():
        return source, None
    path, _, revision = source.partition("@")
    return path, revision or None


def check_model_directory(path: str) -> None:
    """Raise ModelError unless a local directory holds a config, weights and a tokenizer. Hub ids pass."""
    if not is_directory(path):
        return
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json", hint="model.path must be a Hugging Face model directory.")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        raise ModelError(
            f"{path} holds no weights (*.safetensors or pytorch_model*.bin)",
            hint="Download the whole model, or point model.path at the folder that holds its weights.",
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise ModelError(f"{path} holds no tokenizer", hint="Save the tokenizer beside the model.")


def model_identity(config: ModelConfig) -> str:
    """What a fingerprint says of a model: content for a directory, name and revision for a hub id. Never a path."""
    if not is_directory(config.path):
        return f"{config.path}@{config.revision or 'main'}"
    return directory_identity(config.path)


def directory_identity(path: str | Path) -> str:
    """Hash of a model or adapter directory: small files whole, of each weight file its size, start and end."""
    digest = hashlib.sha256()
    folder = Path(path).expanduser()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors", ".bin", ".model", ".jinja") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\x1f{size}\x1f".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            if size > 2 * _SAMPLED_BYTES:
                stream.seek(-_SAMPLED_BYTES, 2)
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def model_name(path: str) -> str:
    """A name that says which weights: the hub id, or a directory's own name and the hash of its content."""
    return f"{Path(path).expanduser().resolve().name}@{directory_identity(path)}" if is_directory(path) else path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with left padding and a pad token; raises ModelError where it cannot be loaded."""
    from transformers import AutoTokenizer

    path, revision = split_source(config.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code, revision=revision, padding_side="left"
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {config.path}: {error}", hint="Check model.path.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encoder_max_length(tokenizer: Any, config: Any) -> int:
    """Longest text, tokens, that an encoder such as BERT reads."""
    # Some position tables keep two rows for padding (RoBERTa), hence the minus two.
    positions = getattr(config, "max_position_embeddings", None) or 512
    return int(min(tokenizer.model_max_length, positions - 2))


def load_causal_lm(
    source: str, dtype: str = "auto", trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """The model with its LM head; ``options`` as of ``from_pretrained``. Raises ModelError where config or weights are
    missing or unreadable."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    path, revision = split_source(source)
    check_model_directory(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)
        # SDPA attention leaves Gemma 2's soft cap on attention scores out, without a word; eager attention applies it.
        capped = getattr(config, "attn_logit_softcapping", None)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
            attn_implementation="eager" if capped else None,
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"cannot load a causal language model from {source}: {first_line(error)}",
            hint="Give model.path a hub id, or a folder with config.json and weights.",
        ) from error
    return model


def max_model_len(path: str) -> int | None:
    """Longest sequence at which all engines agree about a local model; None where its config does not bind it.

    Models with LongRoPE (Phi-3.5) have two sets of rotary factors. vLLM takes the long set for every prompt once its
    maximum length exceeds the original one, transformers only for sequences that do.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text())
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    return config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
