"""The two DeepSpeed engines: G, the embedding model, and D, the domain discriminator.

This is the only module that imports DeepSpeed. What holds, and why:

- One engine per player. With both in one engine, the idle player's parameters still move (momentum, decay).
- A G step runs D frozen and *outside* its engine (`frozen`): through the engine it is wrong at ZeRO 3, and
  unfrozen it is wrong at ZeRO 0 and 1.
- Parameters, gradients and moments are float32 at every ZeRO stage. `bf16` runs the forward and backward
  passes in bfloat16 by autocast inside the module, which is the same at every stage and inside and outside
  the engine, and leaves checkpoints in one format.
- A step whose loss or gradient is not finite changes nothing: not parameters, not moments, not running
  statistics (`refused`). Above ZeRO 0 DeepSpeed leaves such an update out by itself.
- Parameters are loaded before DeepSpeed takes the module over, so that only moments have to be put back.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmx.distributed import World
from dmx.imports import without
from dmx.model import frozen_statistics

Precision = Literal["fp32", "bf16"]

MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed's default bucket would allocate gigabytes; ours holds a ResNet-50 in one go.
BUCKET_ELEMENTS = 30_000_000


@dataclass(frozen=True)
class EngineSettings:
    """Optimiser, precision and sharding of one engine; `lr` is set anew every epoch."""

    lr: float
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    accumulation: int = 1
    zero_stage: int = 1
    precision: Precision = "fp32"


def precision_here(wanted: Literal["fp32", "bf16", "auto"], device: str) -> Precision:
    """The precision that `wanted` means on this machine. All processes have to train in the same one."""
    if wanted == "auto":
        return "bf16" if computes_in_bf16(device) else "fp32"
    return wanted


def computes_in_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 itself; elsewhere it is emulated and slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _Precision(nn.Module):
    """Runs a module in bfloat16 by autocast, with float32 outputs; or as it is."""

    def __init__(self, module: nn.Module, precision: Precision, device: str) -> None:
        super().__init__()
        self.module = module
        self._bf16 = precision == "bf16"
        self._device = device

    def forward(self, *inputs: Tensor) -> Any:
        if not self._bf16:
            return self.module(*inputs)
        with torch.autocast(self._device, dtype=torch.bfloat16):
            outputs = self.module(*inputs)
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(output.float() for output in outputs)


def import_deepspeed() -> Any:
    """Import DeepSpeed without its compiling, probing or logging anything."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with without("wandb"):
        import deepspeed
        import deepspeed.ops

    # Asked for, this table runs a compiler to see what could be built; on the CPU, DeepSpeed would then build
    # a shared-memory collective. Nothing here needs a compiled operation.
    deepspeed.ops.__compatible_ops__ = {}
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return deepspeed


def forget_process_group() -> None:
    """Make DeepSpeed forget the process group, which is about to end, so that another run can follow."""
    deepspeed = import_deepspeed()
    deepspeed.utils.groups._release_process_group_references(group=None)
    deepspeed.comm.comm.cdb = None


def _deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.accumulation,
        # DeepSpeed's own default clips at 1.
        "gradient_clipping": settings.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        },
        "steps_per_print": None,
    }


def _leave_out_what_is_not_finite(adam: torch.optim.Optimizer, *_: object) -> None:
    """Tell the fused Adam, by the flag that gradient scaling sets, whether to leave the update out."""
    gradients = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    adam.found_inf = (~norms.isfinite().all()).float()  # type: ignore[attr-defined]


class _Statistics:
    """A module's buffers as a step found them: its forward pass moves them before its loss is known."""

    def __init__(self, module: nn.Module) -> None:
        self._own = list(module.buffers())
        self._kept: list[Tensor] | None = None

    def keep(self) -> None:
        """Remember them, if nothing is remembered yet."""
        if self._kept is None:
            self._kept = [buffer.clone() for buffer in self._own]

    def forget(self, *, put_back: bool) -> None:
        """End the step, with the buffers as they are or as they were."""
        if put_back and self._kept is not None:
            for buffer, kept in zip(self._own, self._kept, strict=True):
                buffer.copy_(kept)
        self._kept = None


class Engine:
    """One module, its Adam and its sharding over the processes. All methods are collective."""

    def __init__(self, module: nn.Module, settings: EngineSettings, world: World) -> None:
        """Take `module` over: it is moved to the device and, at ZeRO 3, its parameters are sharded.

        Args:
            module: with the parameters to start from, the same on every process.
            settings: optimiser, precision and sharding.
            world: this process among the others; the process group is up.
        """
        deepspeed = import_deepspeed()
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists on it.
        self.settings = settings
        self.world = world
        # DeepSpeed walks the parameters by name; torch's Adam is passed in because one that is asked for by
        # name would be compiled.
        self._replica = copy.deepcopy(module) if settings.zero_stage == 3 else None
        self._wrapped = _Precision(module.to(world.device), settings.precision, world.device.type)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        adam = torch.optim.Adam(trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        if settings.zero_stage == 0:
            adam.register_step_pre_hook(_leave_out_what_is_not_finite)
        self._engine, *_ = deepspeed.initialize(
            model=self._wrapped,
            optimizer=adam,
            model_parameters=trained,
            config=_deepspeed_config(settings),
            dist_init_required=False,
        )
        self._gathered: Callable[[list[nn.Parameter]], Any] = deepspeed.zero.GatheredParameters
        self._adam = adam
        self._trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._statistics = _Statistics(module)
        self.refused = False

    @property
    def module(self) -> nn.Module:
        """The module as it was passed in. At ZeRO 3 its parameters are sharded."""
        return self._wrapped.module

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward in training mode, to be followed by `backward`."""
        self._statistics.keep()
        self._engine.train()
        return self._engine(*inputs)

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The module in training mode, with neither its parameters nor its running statistics moving.

        Gradients flow through it to its inputs. Call what this yields: it keeps the precision.
        """
        self._engine.train()
        for _, parameter in self._trained:
            parameter.requires_grad_(False)
        try:
            with frozen_statistics(self._wrapped):
                yield self._wrapped
        finally:
            for _, parameter in self._trained:
                parameter.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (averaged over processes and micro-batches)."""
        # An infinite loss may have a finite gradient: what is not finite shall be so in all of it.
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))

    def step(self) -> None:
        """Count one micro-batch; after the last of a step, clip, update and clear the gradient.

        `refused` then says whether loss or gradient were not finite, on any process, or the gradient's norm
        above what float32 holds. Nothing has changed in that case.
        """
        is_last = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if not is_last:
            return
        if self.settings.zero_stage == 0:
            self.refused = bool(self._adam.found_inf)  # type: ignore[attr-defined]
        else:
            self.refused = not self._engine.was_step_applied()
        self._statistics.forget(put_back=self.refused)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the following steps."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def for_inference(self) -> nn.Module:
        """The module in evaluation mode with whole parameters, to be called as often as each process likes.

        At ZeRO 3 it is a copy: the sharded module would wait for all processes at every call.
        """
        if self._replica is None:
            return self.module.eval()
        self._replica.load_state_dict(self.module_state())
        return self._replica.to(self.world.device).eval()

    def share_buffers(self) -> None:
        """Give all processes the first one's running statistics, where they are kept per process."""
        if self.world.size > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    @contextmanager
    def _gathered_parameters(self) -> Iterator[nn.Module]:
        """The module with whole parameters, to be read and not written."""
        parameters = list(self.module.parameters())
        with self._gathered(parameters) if self.settings.zero_stage == 3 else nullcontext():
            yield self.module

    def module_state(self) -> dict[str, Tensor]:
        """Whole float32 parameters and the buffers, by name, on the CPU, on every process."""
        with self._gathered_parameters() as module:
            return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        """Adam's whole moments (`name.exp_avg`, `name.exp_avg_sq`) on every process, and its steps."""
        flat = self._flat()
        own = self._adam.state.get(flat[0], {}) if flat else {}
        if not own:
            return {}, 0
        moments = {
            f"{name}.{moment}": self._whole_moment(parameter, moment)
            for name, parameter in self._trained
            for moment in MOMENTS
        }
        return moments, int(own["step"])

    def load_optimizer_state(self, moments: dict[str, Tensor], steps: int) -> None:
        """Go on from what `optimizer_state` returned, at any number of processes and ZeRO stage."""
        if not steps:
            return
        for flat in self._flat():
            # A fresh engine has no Adam state, and moments can only be written where there is one.
            self._adam.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        if self.settings.zero_stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trained:
            for moment in MOMENTS:
                self._set_whole_moment(parameter, moment, moments[f"{name}.{moment}"].to(self.world.device))

    def _flat(self) -> list[Tensor]:
        """The tensors Adam really updates: parameters at ZeRO 0, flat partitions above."""
        match self.settings.zero_stage:
            case 0:
                return [parameter for _, parameter in self._trained]
            case 1 | 2:
                return list(self._engine.optimizer.single_partition_of_fp32_groups)
            case _:
                return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def _whole_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self.settings.zero_stage == 0:
            return self._adam.state[parameter][moment].cpu().clone()  # type: ignore[no-any-return]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment).detach().cpu().clone()  # type: ignore[no-any-return]

    def _set_whole_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        if self.settings.zero_stage == 0:
            self._adam.state[parameter][moment].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, moment)

    def forget_moments(self) -> None:
        """Make Adam start anew, as the published code does every epoch of stage two."""
        for state in self._adam.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        self._engine.destroy()
