"""What the experts of a trained model do: how often each is open, on a part of the data and along the training.

L layers   T tokens   E experts of a token
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalerec import checkpoint
from scalerec.batch import Batch
from scalerec.config import parse
from scalerec.data.loader import Loader
from scalerec.data.reader import ParquetRows
from scalerec.data.split import Part
from scalerec.errors import InputError
from scalerec.evaluate import BATCH
from scalerec.layers.experts import ExpertFFN
from scalerec.models.base import Model
from scalerec.studies.describe import tokens as describe_tokens
from scalerec.training.run import Run

DEAD = 1e-3  # share of rows below which an expert counts as dead (docs/models.md)


def measure(folder: Path, part: Part = "test") -> dict[str, Any]:
    """Frequencies of the best checkpoint of a run on a part of its data, what follows from them, and the way there.

    Raises:
        InputError: no checkpoint there, or a model without experts.
    """
    saved = checkpoint.load(folder)
    model = saved.model()
    layers = layers_of(model)
    if not layers:
        raise InputError(f"{folder}: its {saved.run['model']['kind']} has no experts: train one with --model.experts")
    trained = parse(Run, saved.run, str(folder))
    rows = ParquetRows.of(trained.data, trained.data.prepare(), skip_bad_shards=trained.skip_bad_shards)
    often = frequency(model, Loader(rows, saved.encoder, part, BATCH))
    of_one = [2 * layer.up[0, 0].numel() for layer in layers]  # multiply-adds of an expert, both ways
    found: dict[str, Any] = {"part": part, **figures(often), "open_by_expert": often.round(6).tolist()}
    found["expert_macs"] = sum(one * some.size for one, some in zip(of_one, often))
    found["active_expert_macs"] = round(sum(one * some.sum() for one, some in zip(of_one, often)))
    features = [token["features"] for token in describe_tokens(model)]
    found["tokens"] = [
        # Mixing makes output token t of head t of all tokens: features are named for the tokens of the first layer.
        {"layer": i, "token": t, **figures(often[i, t]), "features": features[t] if i == 0 and features else []}
        for i in range(often.shape[0])
        for t in range(often.shape[1])
    ]
    found["target"] = layers[0].config.target
    found["along"] = along(saved.folder.parent.parent / "log.jsonl")
    return found


def layers_of(model: Model) -> list[ExpertFFN]:
    """The layers of a model that have experts, in their order."""
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


@torch.inference_mode()
def frequency(model: Model, batches: Iterable[Batch]) -> np.ndarray:
    """[L, T, E] share of the rows for which a gate is open, as the model is served."""
    layers, rows = layers_of(model), 0
    opened = [torch.zeros(layer.tokens, layer.config.count, dtype=torch.int64) for layer in layers]

    def hook(number: int) -> Callable[..., None]:
        def count(layer: ExpertFFN, inputs: tuple) -> None:
            opened[number] += (layer.gates(inputs[0].transpose(0, 1)) != 0).sum(1).cpu()

        return count

    hooks = [layer.register_forward_pre_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        for batch in batches:
            model(batch)
            rows += len(batch)
    finally:
        for handle in hooks:
            handle.remove()
    return (torch.stack(opened) / max(rows, 1)).numpy().astype(np.float64)


def figures(often: np.ndarray) -> dict[str, float]:
    """Of frequencies [..., E]: mean, share of dead experts, and by token the load's std / mean and entropy / log E.

    The last two are means over tokens that have any expert open.
    """
    by_token = often.reshape(-1, often.shape[-1])
    used = by_token[by_token.sum(1) > 0]
    load = used / used.sum(1, keepdims=True)
    entropy = -(load * np.log(np.where(load > 0, load, 1))).sum(1) / np.log(often.shape[-1])
    deviation = load.std(1) * often.shape[-1]
    return {
        "open": float(often.mean()),
        "dead": float((often < DEAD).mean()),
        "load_cv": float(deviation.mean()) if len(used) else 0.0,
        "entropy": float(entropy.mean()) if len(used) else 0.0,
    }


def along(log: Path) -> dict[str, Any]:
    """What a run's log says of its experts: steps [N], open [N, L, T], lambda [N]; empty lists without one."""
    found: dict[str, Any] = {"steps": [], "open": [], "lambda": []}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        if "open_by_expert" in entry:
            found["steps"].append(entry["step"])
            found["open"].append(np.mean(entry["open_by_expert"], axis=2).round(5).tolist())
            found["lambda"].append(entry.get("lambda"))
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Figure 4 of the paper: the share of open experts of each token along the training; below, of each expert now."""
    from matplotlib.figure import Figure

    often, along = np.array(found["open_by_expert"]), found["along"]
    layers, tokens, _ = often.shape
    picture = Figure(figsize=(4.5 * layers, 7), layout="constrained")
    axes = picture.subplots(2, layers, squeeze=False)
    for layer in range(layers):
        upper, lower = axes[0, layer], axes[1, layer]
        for token in range(tokens if along["steps"] else 0):
            upper.plot(along["steps"], np.array(along["open"])[:, layer, token], linewidth=0.9, label=f"token {token}")
        upper.axhline(found["target"], color="black", linestyle="--", linewidth=0.8)
        upper.set(title=f"layer {layer}", xlabel="step", ylabel="share of experts open", ylim=(0, None))
        image = lower.imshow(often[layer], aspect="auto", vmin=0, cmap="viridis")
        lower.set(xlabel="expert", ylabel="token", title=f"{found['part']} rows with the expert open")
        picture.colorbar(image, ax=lower)
    if along["steps"] and tokens <= 16:
        axes[0, -1].legend(fontsize=6, ncols=2)
    picture.savefig(path, dpi=130)
