"""Checkpoints: sizes, saving and loading, error messages for unusable ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kronos_stream.model import (
    CheckpointError,
    Predictor,
    Tokenizer,
    load_predictor,
    load_tokenizer,
    save,
)
from kronos_stream.model.checkpoint import PINNED_REVISIONS
from kronos_stream.model.config import PUBLISHED_PREDICTORS

Loader = Callable[[str | Path], Tokenizer | Predictor]
LOADERS: dict[str, Loader] = {"tokenizer": load_tokenizer, "predictor": load_predictor}

both = pytest.mark.parametrize("kind", ["tokenizer", "predictor"])


@pytest.fixture
def checkpoint(parity_folder: Path, tmp_path: Path, kind: str) -> Path:
    """A copy of a tiny checkpoint, to be damaged by tests."""
    return Path(shutil.copytree(parity_folder / "tiny" / kind, tmp_path / kind))


def loading_error(source: str | Path, kind: str) -> str:
    """Return the message of the loading error, which must be one line of readable length."""
    with pytest.raises(CheckpointError) as caught:
        LOADERS[kind](source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 800
    return message


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("mini", 4_108_032), ("small", 24_741_376), ("base", 102_310_592), ("large", 499_246_976)],
)
def test_parameter_counts_equal_the_references(size: str, parameters: int) -> None:
    """Each size has exactly the number of parameters of the reference."""
    with torch.device("meta"):
        predictor = Predictor(PUBLISHED_PREDICTORS[size])
    assert sum(p.numel() for p in predictor.parameters()) == parameters


@both
def test_state_dicts_equal_the_published_layout(parity_folder: Path, kind: str) -> None:
    """A module's state dict has exactly the names, shapes and types of a published file."""
    published = load_file(parity_folder / "tiny" / kind / "model.safetensors")
    state = LOADERS[kind](parity_folder / "tiny" / kind).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in published.items()
    }


@both
def test_round_trip_is_bit_equal(parity_folder: Path, tmp_path: Path, kind: str) -> None:
    """Saving and loading changes no bit and no setting, and writes only the two files."""
    first = LOADERS[kind](parity_folder / "tiny" / kind)
    folder = save(first, tmp_path / "new" / "folder")
    second = LOADERS[kind](folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert second.config == first.config
    before, after = first.state_dict(), second.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    published = load_file(parity_folder / "tiny" / kind / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = load_file(folder / "model.safetensors")
    assert written.keys() == published.keys()
    assert all(torch.equal(written[name], published[name]) for name in published)


@both
def test_saving_replaces_an_existing_checkpoint(
    parity_folder: Path, tmp_path: Path, kind: str
) -> None:
    """Saving into a folder that holds a checkpoint replaces it."""
    module = LOADERS[kind](parity_folder / "tiny" / kind)
    save(module, tmp_path)
    for parameter in module.parameters():
        parameter.add_(1.0)
    save(module, tmp_path)
    again = LOADERS[kind](tmp_path).state_dict()
    assert all(torch.equal(again[n], t) for n, t in module.state_dict().items())


@both
def test_half_precision_file_loads_as_fp32(checkpoint: Path, kind: str) -> None:
    """Weights stored as fp16 are loaded as fp32 with the stored values; integers are unchanged."""
    path = checkpoint / "model.safetensors"
    half = {n: t.half() if t.is_floating_point() else t for n, t in load_file(path).items()}
    save_file(half, path)
    state = LOADERS[kind](checkpoint).state_dict()
    for name, stored in half.items():
        wanted = torch.float32 if stored.is_floating_point() else stored.dtype
        assert state[name].dtype == wanted
        assert torch.equal(state[name], stored.to(wanted))


@both
def test_loaded_modules_are_in_eval_mode_without_gradients(checkpoint: Path, kind: str) -> None:
    """A loaded module is in eval mode throughout, without gradients, even if it has dropout."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config |= {"ffn_dropout_p": 0.5, "attn_dropout_p": 0.5, "resid_dropout_p": 0.5}
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    module = LOADERS[kind](checkpoint)
    assert not any(part.training for part in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    assert {p.device.type for p in module.parameters()} == {"cpu"}


@both
def test_unknown_settings_are_ignored(checkpoint: Path, kind: str) -> None:
    """Unknown fields in config.json are ignored."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "k"}), "utf-8")
    assert LOADERS[kind](checkpoint).config.to_dict() == config


@both
def test_missing_folder_is_reported(tmp_path: Path, kind: str) -> None:
    """The message names the folder and the alternatives."""
    message = loading_error(tmp_path / "nowhere", kind)
    assert str(tmp_path / "nowhere") in message
    assert "give an existing folder" in message


@both
def test_missing_config_is_reported(checkpoint: Path, kind: str) -> None:
    """The message names the folder, the missing file and the contents of a checkpoint folder."""
    (checkpoint / "config.json").unlink()
    message = loading_error(checkpoint, kind)
    assert f"{checkpoint}: no config.json" in message
    assert "give the folder that holds config.json and model.safetensors" in message


@both
def test_missing_weights_are_reported(checkpoint: Path, kind: str) -> None:
    """The message names the folder, the missing file and the remedy."""
    (checkpoint / "model.safetensors").unlink()
    message = loading_error(checkpoint, kind)
    assert f"{checkpoint}: no model.safetensors" in message
    assert "fetch or copy the checkpoint again" in message


@both
@pytest.mark.parametrize("garbage", [b"{not json", b"", b"\xff\xfe\x00", b"[1, 2]"])
def test_invalid_json_is_reported(checkpoint: Path, kind: str, garbage: bytes) -> None:
    """The message names the file, says that it is not a JSON object, and gives the remedy."""
    (checkpoint / "config.json").write_bytes(garbage)
    message = loading_error(checkpoint, kind)
    assert str(checkpoint / "config.json") in message
    assert "JSON" in message
    assert "fetch or copy the checkpoint again" in message


@both
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"s1_bits": None}, "NoneType"),
        ({"n_heads": 0}, "modulo by zero"),
        ({"n_heads": 5}, "does not split into 5 heads"),
        ({"d_model": -64}, "negative"),
    ],
)
def test_unusable_config_is_rejected(
    checkpoint: Path, kind: str, change: dict[str, int | None], cause: str
) -> None:
    """The message names the file and the reason why no network can be built from it."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | change), "utf-8")
    message = loading_error(checkpoint, kind)
    assert str(checkpoint / "config.json") in message
    assert cause in message
    assert "is this the right kind of checkpoint?" in message


def test_checkpoint_of_the_other_network_is_rejected(parity_folder: Path) -> None:
    """The message says that the folder holds the other network."""
    for kind, other in (("tokenizer", "predictor"), ("predictor", "tokenizer")):
        message = loading_error(parity_folder / "tiny" / other, kind)
        assert f"not a {kind.title()}Config: " in message
        assert "is this the right kind of checkpoint?" in message


@both
@pytest.mark.parametrize("keep", [0, 5, 1_000, 400_000])
def test_truncated_weights_are_rejected(checkpoint: Path, kind: str, keep: int) -> None:
    """A weights file truncated at any position is reported as unreadable, with the remedy."""
    path = checkpoint / "model.safetensors"
    os.truncate(path, keep)
    message = loading_error(checkpoint, kind)
    assert f"{path}: not a readable safetensors file" in message
    assert "fetch or copy the checkpoint again" in message


@both
def test_mismatched_shapes_are_rejected(checkpoint: Path, kind: str) -> None:
    """The message names the weights file whose shapes differ from config.json, and the remedy."""
    module = LOADERS[kind](checkpoint)
    config = replace(module.config, ff_dim=module.config.ff_dim * 2)
    (checkpoint / "config.json").write_text(json.dumps(config.to_dict()), "utf-8")
    message = loading_error(checkpoint, kind)
    assert f"{checkpoint / 'model.safetensors'}: does not fit its config.json" in message
    assert "take both files from one checkpoint" in message
    assert "size mismatch" in message


@both
def test_missing_tensor_is_reported(checkpoint: Path, kind: str) -> None:
    """The message names the missing tensor."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    del weights["head.bias" if kind == "tokenizer" else "head.proj_s1.bias"]
    save_file(weights, path)
    message = loading_error(checkpoint, kind)
    assert "does not fit its config.json" in message
    assert "bias" in message


def load_in_subprocess(home: Path, **environment: str) -> list[str]:
    """Load the published small predictor with the hub cache ``home``; return the output lines.

    In a subprocess, because the hub client reads its settings once, at import.
    """
    script = (
        "from kronos_stream.model import *\n"
        "try: print('loaded', load_predictor('NeoQuasar/Kronos-small').config.d_model)\n"
        "except CheckpointError as error: print(error)"
    )
    settings = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), **environment}
    done = subprocess.run(  # noqa: S603 - our own interpreter and script
        [sys.executable, "-c", script],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.splitlines() + done.stderr.splitlines()


def test_unreachable_hub_is_reported(tmp_path: Path) -> None:
    """Offline with an empty cache, the message is one line with the cause and three remedies."""
    (message,) = load_in_subprocess(tmp_path, HF_HUB_OFFLINE="1")
    assert "NeoQuasar/Kronos-small at 901c26c" in message
    assert "neither the hub nor its local cache has it" in message
    assert "check the name and the network" in message
    assert "HF_HOME" in message
    assert "give a checkpoint folder" in message


def test_cached_commit_needs_no_hub(parity_folder: Path, tmp_path: Path) -> None:
    """A pinned revision in the cache is loaded without a request to the hub."""
    name, revision = "NeoQuasar/Kronos-small", PINNED_REVISIONS["NeoQuasar/Kronos-small"]
    snapshots = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    shutil.copytree(parity_folder / "tiny" / "predictor", snapshots / revision)
    # Nothing listens at this address, so a request would print retries on stderr.
    lines = load_in_subprocess(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert lines == ["loaded 64"]
