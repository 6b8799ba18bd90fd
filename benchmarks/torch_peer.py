"""The peer of benchmarks/vs_torch.py: the train step of diffusers' UNet in torch."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from sizes import SIZES

# Both have AdamW with these; weight decay is on kernels alone, as sdjax has it.
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 1e-2, 1.0


class Torch:
    """The same step by torch. Several may share a model, one after the other."""

    def __init__(
        self, args: argparse.Namespace, batch: dict[str, np.ndarray], model: Any, *, compiled: bool
    ):
        self._device, self._autocast = torch_device(), args.dtype == "bfloat16"
        self._format = torch.channels_last if args.channels_last else torch.contiguous_format
        self._batch = {name: self._put(value) for name, value in batch.items()}
        self._model = model
        self._call = torch.compile(model) if compiled else model

    def _put(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.tensor(array, device=self._device)
        if tensor.ndim == 4:  # [B, H, W, C] -> [B, C, H, W]
            tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=self._format)
        return tensor

    def restart(self, tensors: dict[str, np.ndarray]) -> None:
        """Begin with these weights."""
        self._model.load_state_dict({name: torch.tensor(v) for name, v in tensors.items()})
        self._model.train()
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, fused=True
        )

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: (loss, gradient norm), perhaps still to be computed."""
        batch = self._batch
        added = None
        if "pooled" in batch:
            added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            out = self._call(
                batch["xt"], batch["timesteps"], batch["context"], added_cond_kwargs=added
            ).sample
        loss = torch.nn.functional.mse_loss(out.float(), batch["eps"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def wait(self) -> None:
        """Until all steps are done."""
        if self._device == "cuda":
            torch.cuda.synchronize()


def torch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def import_diffusers() -> Any:
    """The package, or an error that says how to get it."""
    # diffusers and transformers import torchvision if it is there, and fail if its operators are of
    # another torch. Nothing here needs it.
    if "torchvision" not in sys.modules:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        import diffusers

        diffusers.UNet2DConditionModel  # noqa: B018  imported when it is first asked for
    except ImportError as error:
        raise SystemExit(
            f"error: the peer is diffusers, which cannot be imported ({error}); install it with "
            "pip install diffusers transformers accelerate"
        ) from error
    return diffusers


def make_model(args: argparse.Namespace) -> Any:
    """diffusers' UNet with its own random weights, float32, on the device."""
    diffusers = import_diffusers()
    if args.dtype == "bfloat16" or torch_device() == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    fields = SIZES[args.size].unet.to_json()
    fields.pop("_class_name")
    model = diffusers.UNet2DConditionModel(**fields).to(torch_device())
    return model.to(memory_format=torch.channels_last) if args.channels_last else model
