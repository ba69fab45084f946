"""Chooses the recorded arrays that live with the tests: `python tests/golden/select_arrays.py GOLDEN_FOLDER`.

From the full recording (about 40 MB) it keeps the transformer's weights and arrays of one batch, every ranking problem
of the rank-based training step, and the smaller cases of the loss functions.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
PARTS = {
    "encoder_weights": ("query_head.transformer.encoder.", "query_head.transformer.level_embeds"),
    "decoder_weights": (
        "query_head.transformer.decoder.",
        "query_head.transformer.enc_output",
        "query_head.transformer.pos_trans",
        "query_head.cls_branches.",
        "query_head.reg_branches.",
        "query_head.query_embedding.",
    ),
}
FORWARD = ("neck.", "memory", "enc_outputs_class", "enc_bbox_preds", "enc_topk_index", "all_cls_scores")
FORWARD += ("all_bbox_preds", "match.", "gt_bboxes.", "gt_labels.")
# Only the main queries and the encoder proposals send gradient to these, so that the transformer alone shows it.
GRADIENTS = ("query_head.transformer.enc_output", "query_head.transformer.pos_trans", "query_head.query_embedding.")
GRADIENTS += ("query_head.cls_branches.2.", "query_head.reg_branches.2.")
# Of Co-DINO: all between the neck and the losses of the main and the denoising queries.
DINO_WEIGHTS = ("query_head.transformer.", "query_head.cls_branches.", "query_head.reg_branches.")
DINO_WEIGHTS += ("query_head.label_embedding.",)
DINO_ARRAYS = ("neck.", "dn.", "enc_topk", "all_cls_scores", "all_bbox_preds", "gt_bboxes.", "gt_labels.", "match.")
DINO_GRADIENTS = ("query_head.transformer.enc_output", "query_head.transformer.query_embed.")
DINO_GRADIENTS += ("query_head.label_embedding.", "query_head.cls_branches.2.", "query_head.reg_branches.2.")
LARGEST_GRADIENT = 2000  # numbers; biases and norms tell of the larger ones
HEADS = {"rpn_head.rpn_cls.bias", "rpn_head.rpn_reg.bias", "bbox_head.0.atss_cls.bias", "bbox_head.0.atss_reg.bias"}
HEADS |= {"bbox_head.0.atss_centerness.bias", *(f"bbox_head.0.scales.{level}.scale" for level in range(5))}
LARGEST_CASE = 1100  # logits
LOSSES = ("rs", "brs", "ap", "bap", "alrp")


def select(golden: Path) -> None:
    """Write the chosen arrays beside this file."""
    folders = {family: golden / family for family in ("co_detr", "brs_detr")}
    weights = {family: load_file(folder / "state_dict.safetensors") for family, folder in folders.items()}
    for name, beginnings in PARTS.items():
        chosen = {key: value for key, value in weights["brs_detr"].items() if key.startswith(beginnings)}
        assert all(torch.equal(value, weights["co_detr"][key]) for key, value in chosen.items())
        save_file(chosen, HERE / f"{name}.safetensors")
    arrays, found = (load_file(folders["brs_detr"] / f"{name}.safetensors") for name in ("train_normal", "eval"))
    kept = {key: value for key, value in arrays.items() if key.startswith(FORWARD) and ".labels" not in key}
    kept |= {key: value for key, value in found.items() if key.startswith("detr_sorted.batch")}
    both = load_file(folders["co_detr"] / "train_normal.safetensors")
    assert all(torch.allclose(kept[name], both[name], atol=1e-4) for name in ("all_cls_scores", "all_bbox_preds"))
    kept |= {f"co_detr.{key}": value for key, value in both.items() if key.startswith("match.") and "pos_query" in key}
    save_file(kept, HERE / "forward.safetensors")
    save_file({k: v for k, v in arrays.items() if k.startswith("rank.")}, HERE / "ranking.safetensors")
    save_file(of_co_dino(golden / "co_dino"), HERE / "co_dino.safetensors")
    terms = {
        family: json.loads((folder / "summary.json").read_text())["normal"]["losses"]
        for family, folder in (folders | {"co_dino": golden / "co_dino"}).items()
    }
    (HERE / "losses.json").write_text(json.dumps(terms, indent=1))
    np.savez_compressed(HERE / "loss_functions.npz", **loss_cases(golden / "losses"))
    np.savez_compressed(HERE / "step.npz", **training_step(folders, weights["co_detr"]))


def of_co_dino(folder: Path) -> dict[str, Tensor]:
    """Weights and arrays of Co-DINO's transformer in a step, with its denoising draws, and small gradients."""
    weights, arrays, gradients = (
        load_file(folder / f"{name}.safetensors") for name in ("state_dict", "train_normal", "train_normal_grads")
    )
    kept = {
        f"weights.{name}": value
        for name, value in weights.items()
        if name.startswith(DINO_WEIGHTS) and "aux_pos_trans" not in name
    }
    kept |= {name: value for name, value in arrays.items() if name.startswith(DINO_ARRAYS)}
    kept |= {
        f"gradient.{name}": value
        for name, value in gradients.items()
        if name.startswith(DINO_GRADIENTS) and value.numel() <= LARGEST_GRADIENT
    }
    return {name: value.contiguous() for name, value in kept.items()}


def training_step(folders: dict[str, Path], weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Outputs and labels of the RPN and the ATSS head, and small gradients of a step of each family."""
    kept = {f"scale.{level}": weights[f"bbox_head.0.scales.{level}.scale"] for level in range(5)}
    outputs = {}
    for family, folder in folders.items():
        arrays = load_file(folder / "train_normal.safetensors")
        for name, gradient in load_file(folder / "train_normal_grads.safetensors").items():
            if name in HEADS or (name.startswith(GRADIENTS) and gradient.numel() <= LARGEST_GRADIENT):
                kept[f"{family}.gradient.{name}"] = gradient
        outputs[family] = {k: v for k, v in arrays.items() if k.startswith(("atss.cls", "atss.reg", "rpn.cls"))}
        for level in range(5):
            for head in ("rpn", "atss"):
                labels, used = (arrays[f"{head}.target.{kind}.{level}"] for kind in ("labels", "label_weights"))
                kept[f"{family}.{head}.labels.{level}"] = torch.where(used > 0, labels, -1).to(torch.int8)
            # offsets of the RPN where an object is assigned; elsewhere no loss reads them
            offsets, labels = arrays[f"rpn.reg.{level}"], kept[f"{family}.rpn.labels.{level}"]
            cells = offsets.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
            found = (labels == 0).view(cells.shape[:-1])[..., None]
            kept[f"{family}.rpn.reg.{level}"] = torch.where(found, cells, 0.0)
    both = outputs.values()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*(o.values() for o in both), strict=True))
    kept |= outputs["brs_detr"]
    arrays = load_file(folders["co_detr"] / "train_normal.safetensors")
    kept |= {key: value for key, value in arrays.items() if key.startswith("atss.centerness")}
    return {key: value.numpy() for key, value in kept.items()}


def loss_cases(folder: Path) -> dict[str, np.ndarray]:
    """Inputs, outputs and gradients in float64 of the cases that the official losses get through."""
    kept = {}
    for path in sorted(folder.glob("*.npz")):
        case = np.load(path)
        if len(case["logits"]) > LARGEST_CASE:
            continue
        for name in ("logits", "targets", "delta", "regression_losses"):
            if name in case:
                kept[f"{path.stem}/{name}"] = case[name]
        for loss in LOSSES:
            if str(case[f"{loss}_status64"]) == "ok" and f"{loss}_grad64" in case:
                for kind in ("out64", "grad64"):
                    kept[f"{path.stem}/{loss}_{kind}"] = case[f"{loss}_{kind}"]
    return kept


if __name__ == "__main__":
    select(Path(sys.argv[1]))
