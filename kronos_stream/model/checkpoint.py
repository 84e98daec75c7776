"""Read and write checkpoints: ``config.json`` and ``model.safetensors`` in a folder or on a hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kronos_stream.model.config import PredictorConfig, TokenizerConfig
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer

_Config = TypeVar("_Config", TokenizerConfig, PredictorConfig)
_Module = TypeVar("_Module", Tokenizer, Predictor)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_FILE = "model.json"
"""Properties of a bundled model, in the folder that holds predictor/ and tokenizer/."""

PINNED_REVISIONS = {
    "NeoQuasar/Kronos-small": "901c26c1332695a2a8f243eb2f37243a37bea320",
    "NeoQuasar/Kronos-Tokenizer-base": "0e0117387f39004a9016484a186a908917e22426",
}
"""Hub commits used if the caller gives no revision."""

MATCHING_TOKENIZER = {
    "NeoQuasar/Kronos-mini": "NeoQuasar/Kronos-Tokenizer-2k",
    "NeoQuasar/Kronos-small": "NeoQuasar/Kronos-Tokenizer-base",
    "NeoQuasar/Kronos-base": "NeoQuasar/Kronos-Tokenizer-base",
}
"""Tokenizer with which each published predictor was trained."""

PUBLISHED_CONTEXT = {
    "NeoQuasar/Kronos-mini": 2048,
    "NeoQuasar/Kronos-small": 512,
    "NeoQuasar/Kronos-base": 512,
}
"""Window in bars on which each published predictor was trained."""

BUNDLED_FOLDER = Path(__file__).parent.parent / "checkpoints"
"""Folder of the checkpoints that are part of the package."""


_REFETCH_HINT = "fetch or copy the checkpoint again"


@dataclass(frozen=True, slots=True)
class CheckpointLocation:
    """Location of one network's checkpoint: a folder, or a hub id and its commit if known."""

    name: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Locations of a model's tokenizer and predictor."""

    predictor: CheckpointLocation
    tokenizer: CheckpointLocation
    max_context: int | None
    """Window in bars on which the model was trained; None if unknown."""


class CheckpointError(Exception):
    """Unusable checkpoint; the message gives cause and remedy."""


def find_model(
    model: str | Path,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
) -> ModelLocation:
    """Resolve a bundled model's name, a folder with both networks, a predictor or a hub id."""
    folder = Path(model)
    if not folder.is_dir() and (BUNDLED_FOLDER / str(model)).is_dir():
        folder = BUNDLED_FOLDER / str(model)
    if (folder / "predictor").is_dir() and (folder / "tokenizer").is_dir():
        return ModelLocation(
            CheckpointLocation(str(folder / "predictor")),
            _locate(tokenizer or folder / "tokenizer", tokenizer_revision),
            _read_max_context(folder / MODEL_FILE),
        )
    matching = tokenizer or MATCHING_TOKENIZER.get(str(model))
    if matching is None:
        raise CheckpointError(
            f"{model}: no tokenizer given; name one, or give a folder that holds predictor/ and "
            "tokenizer/, or a name such as nano or NeoQuasar/Kronos-small"
        )
    return ModelLocation(
        _locate(model, revision),
        _locate(matching, tokenizer_revision),
        PUBLISHED_CONTEXT.get(str(model)),
    )


def _locate(name: str | Path, revision: str | None) -> CheckpointLocation:
    if Path(name).is_dir():
        return CheckpointLocation(str(name))
    return CheckpointLocation(str(name), revision or PINNED_REVISIONS.get(str(name)))


def _read_max_context(path: Path) -> int | None:
    if not path.is_file():
        return None
    context = _json_object(path).get("max_context")
    if context is not None and (not isinstance(context, int) or context < 1):
        raise CheckpointError(f"{path}: max_context must be a positive number; {_REFETCH_HINT}")
    return context


def load_tokenizer(source: str | Path, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder, hub id or bundled model: eval mode, fp32, on the CPU."""
    folder = fetch_checkpoint(source, revision, part="tokenizer")
    return _load_weights(_build(Tokenizer, TokenizerConfig.from_dict, folder), folder)


def load_predictor(source: str | Path, revision: str | None = None) -> Predictor:
    """Load a predictor from a folder, hub id or bundled model: eval mode, fp32, on the CPU."""
    folder = fetch_checkpoint(source, revision, part="predictor")
    return _load_weights(_build(Predictor, PredictorConfig.from_dict, folder), folder)


def save(module: Tokenizer | Predictor, folder: str | Path) -> Path:
    """Write ``module`` in the published layout; each file is replaced atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(module.config.to_dict(), indent=2) + "\n"
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    part = folder / f"{WEIGHTS_FILE}.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS_FILE)
    part = folder / f"{CONFIG_FILE}.part"
    part.write_text(config, encoding="utf-8")
    part.replace(folder / CONFIG_FILE)
    return folder


def fetch_checkpoint(source: str | Path, revision: str | None = None, *, part: str = "") -> Path:
    """Return the local folder of a checkpoint, downloaded from the hub if it is not cached.

    part: "predictor" or "tokenizer", the network to take from a folder that holds both.
    """
    name = str(source)
    for folder in (Path(source), BUNDLED_FOLDER / name):
        if folder.is_dir():
            return folder / part if (folder / part).is_dir() else folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no checkpoint folder {name!r}; give an existing folder, "
            "nano, or a hub id such as NeoQuasar/Kronos-small"
        )
    return _from_hub(name, revision or PINNED_REVISIONS.get(name))


def _from_hub(name: str, revision: str | None) -> Path:
    # Imported here: loading from a folder requires no hub library.
    try:
        from huggingface_hub import snapshot_download, try_to_load_from_cache
    except ImportError:
        raise CheckpointError(
            f"{name} is a hub id and huggingface_hub is not installed; "
            "install it or give a checkpoint folder"
        ) from None
    wanted = [CONFIG_FILE, WEIGHTS_FILE]
    try:
        if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
            # A commit never changes, so its cached files are used without a network request.
            cached = [try_to_load_from_cache(name, file, revision=revision) for file in wanted]
            if all(isinstance(path, str) for path in cached):
                return Path(str(cached[0])).parent
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises errors of several libraries
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(
            f"{name}{f' at {revision}' if revision else ''}: neither the hub nor its local cache "
            f"has it ({type(error).__name__}: {reason}); check the name and the network, set "
            "HF_HOME to a filled cache, or give a checkpoint folder (nano needs no network)"
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{folder}: no {CONFIG_FILE}; not a checkpoint folder: give the folder that holds "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return _json_object(folder / CONFIG_FILE)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); {_REFETCH_HINT}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object; {_REFETCH_HINT}")
    return raw


def _build(
    module: Callable[[_Config], _Module], config: Callable[[dict[str, Any]], _Config], folder: Path
) -> _Module:
    raw = _config(folder)
    try:
        return module(config(raw))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: {_one_line(error)}; is this the right kind of checkpoint?"
        ) from None


def _load_weights(module: _Module, folder: Path) -> _Module:
    path = folder / WEIGHTS_FILE
    try:
        weights = load_file(path)
        # Half-precision files save space; computation is in fp32 by default.
        weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        module.load_state_dict(weights)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {WEIGHTS_FILE}; incomplete checkpoint: {_REFETCH_HINT}"
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({_one_line(error)}); {_REFETCH_HINT}"
        ) from None
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit its {CONFIG_FILE}; take both files from one checkpoint "
            f"({_one_line(error)})"
        ) from None
    return module.eval().requires_grad_(requires_grad=False)


def _one_line(error: Exception) -> str:
    """Message of ``error`` on one line of bounded length."""
    return " ".join(str(error).split())[:400]
