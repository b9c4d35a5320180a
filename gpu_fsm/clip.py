"""CLIP in this process: `CLIPManager`, the only importer of torch and sentence-transformers.

The weights live in one flat buffer on the CPU, the master, for as long as the manager does.  Going up is one
allocation and one copy, after which the model's tensors are bound to views of the copy; going down binds them to the
master again and drops the copy, so nothing is ever copied back.  A move that fails leaves the model as it was.

What follows from it: inference only.  A change made to the weights in place, or by `.half()` or `.to()` on the raw
model, is undone by the next move.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from attrs import frozen

from gpu_fsm.errors import (
    BadArgument,
    ClipError,
    ClipOutOfMemory,
    ClipUnavailable,
    ConfigError,
    CudaPoisoned,
    ForkedProcess,
    GPUFSMError,
    ManagerClosed,
    one_line,
)
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.status import ClipPlace

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Embeddings = NDArray[np.float32]

log = logging.getLogger("gpu_fsm")

MIB: Final = 1024 * 1024

ALIGNMENT: Final = 256
"""Of every tensor in the flat buffer, in bytes: what the CUDA allocator gives, and more than any kernel asks for."""
ACTIVATIONS_MIB: Final = 128.0
"""Room for one batch of 32 screens in a ViT-B/32 at float32 (about 80 MiB) and cuBLAS's workspace (8 MiB)."""
CONTEXT_MIB: Final = 400.0
"""What a process pays on the card for its first use, for life: 107 to 612 MiB were reported, more on bigger cards."""
CONTEXT_MAX_MIB: Final = 2048.0
"""More than any context; a neighbour took memory during the measurement."""
UNLOADED_WEIGHTS_MIB: Final = 600.0
"""Stands for the weights until they are loaded: a CLIP ViT-B/32 at float32 has 577."""
CPU_THREADS: Final = 4
"""Beyond this CLIP on the CPU gains little, and takes the cores of the program that it should help."""
SAME: Final = 0.9999
"""Least cosine between an embedding before and after a move."""
PINNED_SHARE: Final = 1 / 8
"""Most of the machine's memory that is locked for faster moves: locked pages are lost to everybody else."""
PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
INSTALL: Final = 'Install the extra: pip install "gpu-fsm[clip]".'

_unusable: dict[str, str] = {}
"""Devices that failed with more than out-of-memory, and how.  The driver's state is the process's, so this is too."""


@frozen
class _Slot:
    """One distinct tensor of the model: where it lies in the flat buffer, and everybody who refers to it."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    owners: tuple[tuple[Any, str], ...]
    """(module, name) pairs: more than one for tied weights."""
    parameter: bool

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


class _Weights:
    """All parameters and buffers of a model in one flat CPU buffer, and at times a copy of it on a device."""

    def __init__(self, model: Any) -> None:
        """Take the model over.  Raises `ClipError` naming what cannot be taken; the model is then untouched."""
        import torch

        _refuse_unadoptable(model)
        with torch.inference_mode(False), torch.no_grad():
            tensors, slots, size = _lay_out(model)
            self.nbytes = size
            self._slots = slots
            self._master: torch.Tensor = torch.empty(size, dtype=torch.uint8)
            for tensor, slot in zip(tensors, slots, strict=True):
                slot.view(self._master).copy_(tensor)
            del tensors
            self.bind_master()
        self._copy: torch.Tensor | None = None
        self._unpin: Callable[[], object] | None = None

    @property
    def uploaded(self) -> bool:
        return self._copy is not None

    def devices(self) -> set[torch.device]:
        """The devices of every tensor that the model refers to now."""
        found = set()
        for slot in self._slots:
            for module, name in slot.owners:
                tensor = (module._parameters if slot.parameter else module._buffers).get(name)
                if tensor is not None:
                    found.add(tensor.device)
        return found

    def upload(self, device: torch.device) -> None:
        """Allocate once, copy once, bind.  On an exception call `drop`: nothing but this object holds the copy."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            self._copy = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
            self._pin(device)
            self._copy.copy_(self._master, non_blocking=True)
            torch.accelerator.synchronize(device)
            self._bind(self._copy)

    def bind_master(self) -> None:
        """Make the model refer to the CPU again.  Copies nothing."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            self._bind(self._master)

    def drop(self) -> None:
        """Bind the master and forget the copy on the device."""
        self.bind_master()
        self._copy = None

    def unpin(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None

    def _bind(self, flat: torch.Tensor) -> None:
        import torch

        for slot in self._slots:
            view = slot.view(flat)
            if not slot.parameter:
                for module, name in slot.owners:
                    module._buffers[name] = view
                continue
            first, name = slot.owners[0]
            parameter = first._parameters[name]
            if torch._has_compatible_shallow_copy_type(parameter, view):
                parameter.data = view
            else:
                parameter = torch.nn.Parameter(view, requires_grad=parameter.requires_grad)
            for module, name in slot.owners:
                module._parameters[name] = parameter

    def _pin(self, device: torch.device) -> None:
        """Lock the master's pages for a faster copy, in place and to the byte; pageable where that is refused.

        Only now, since it needs the CUDA context that the copy above has just paid for.  torch's own `pin_memory`
        would copy, and lock up to the next power of two.
        """
        import torch

        if device.type != "cuda" or self._unpin is not None:
            return
        if self.nbytes > PINNED_SHARE * _ram_bytes():
            log.debug("CLIP's weights stay pageable: %.0f MiB are too much to lock here", self.nbytes / MIB)
            return
        try:
            cuda: Any = torch.cuda
            runtime = cuda.cudart()
            address = self._master.data_ptr()
            if int(runtime.cudaHostRegister(address, self.nbytes, 0)) == 0:
                # The master goes into the finalizer too: its pages must not be freed while they are registered.
                master = self._master
                self._unpin = weakref.finalize(self, lambda: (runtime.cudaHostUnregister(address), master)[0])
        except Exception as error:
            log.debug("CLIP's weights stay pageable: %s", one_line(error))


def _ram_bytes() -> int:
    """Return the machine's memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _refuse_unadoptable(model: Any) -> None:
    """Name what would break if its tensors were swapped."""
    import torch
    from torch.nn.utils import parametrize

    def refuse(what: str) -> None:
        raise ClipUnavailable(
            detail=f"this model cannot be managed: {one_line(what)}",
            remedy="Load it plainly on the CPU: no device_map, no quantisation, no compilation.",
        )

    if not isinstance(model, torch.nn.Module):
        refuse(f"{type(model).__name__} is no torch module")
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if hasattr(module, "_hf_hook"):
            refuse(f"{where} has an accelerate hook (device_map or offloading)")
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            refuse(f"{where} is compiled")
        if parametrize.is_parametrized(module):
            refuse(f"{where} has parametrizations")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            tensor_name = f"{name}.{key}" if name else key
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                refuse(f"{tensor_name} is a {type(tensor).__name__} (quantised or wrapped)")
            if tensor.is_meta:
                refuse(f"{tensor_name} is on the meta device, without data")
            if tensor.layout != torch.strided or tensor.is_quantized:
                refuse(f"{tensor_name} is sparse or quantised")
            if tensor.is_inference():
                refuse(f"{tensor_name} was made under torch.inference_mode()")


def _lay_out(model: Any) -> tuple[list[torch.Tensor], list[_Slot], int]:
    """Collect distinct tensors by identity, not from `state_dict`, which lacks buffers that are not persistent."""
    owners: dict[int, list[tuple[Any, str]]] = {}
    found: list[tuple[torch.Tensor, bool]] = []
    for module in model.modules():
        for tensors, parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in owners:
                    owners[id(tensor)] = []
                    found.append((tensor, parameter))
                owners[id(tensor)].append((module, name))
    slots, offset = [], 0
    for tensor, parameter in found:
        nbytes = tensor.numel() * tensor.element_size()
        holders = tuple(owners[id(tensor)])
        slots.append(_Slot(offset, nbytes, tensor.dtype, tuple(tensor.shape), holders, parameter))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return [tensor for tensor, _ in found], slots, offset


class CLIPManager:
    """One sentence-transformers CLIP, on the CPU or on a device; a `CLIPHost`.

    The model is loaded by `prepare` or on first use, always on the CPU.  Who may move it and when is the manager's
    business (leases); the lock in here only keeps a careless caller from crashing the process, because a move under a
    running encode is memory-unsafe.
    """

    simulated = False

    def __init__(self, config: GPUResourceConfig, *, model: Any = None) -> None:
        """`model` takes the place of what `config.clip_model` names: a loaded `SentenceTransformer`, taken over."""
        self._config = config
        self._given = model
        self._managed = model is not None or config.clip_model is not None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        """Held during one batch, and during a move."""
        self._loading = threading.RLock()
        self._model: Any = None
        self._weights: _Weights | None = None
        self._canary: Embeddings | None = None
        self._modalities: frozenset[str] = frozenset()
        self._unavailable: ClipUnavailable | None = None
        self._choice: tuple[torch.device | None, str] | None = None
        self._context_paid = False
        self._context_mib: float | None = None
        self.measure_free_mib: Callable[[], float | None] | None = None
        """The driver's word on free memory, to measure what the first move leaves behind for good."""
        self._closed = False

    # --- where it is -------------------------------------------------------------------------------------------------

    @property
    def place(self) -> ClipPlace:
        """`gpu` if any tensor is off the CPU, `none` where there is no CLIP or it cannot be loaded.  Never raises.

        A CLIP that has not been loaded yet counts as on the CPU: that is where it will appear.
        """
        name = self.device
        return "none" if name == "none" else "cpu" if name == "cpu" else "gpu"

    @property
    def device(self) -> str:
        """The device that every tensor is on, by name; `mixed` should never be seen.  Never raises."""
        weights = self._weights
        if weights is None:
            return "cpu" if self._managed and self._unavailable is None and not self._closed else "none"
        try:
            names = {_device_name(device) for device in weights.devices()}
        except Exception as error:
            log.warning("CLIP's device cannot be read: %s", one_line(error))
            names = set()
        return names.pop() if len(names) == 1 else "mixed" if names else "cpu"

    @property
    def gpu_usable(self) -> bool:
        """Whether CLIP could go to a GPU at all in this process.  Never raises; the first call may import torch."""
        return not self.gpu_unusable_reason

    @property
    def gpu_unusable_reason(self) -> str:
        """Why not, in words; empty where it can."""
        if not self._managed or self._closed:
            return "no CLIP is managed"
        if self._unavailable is not None:
            return one_line(self._unavailable.summary())
        try:
            device, reason = self._chosen()
        except Exception as error:
            return f"torch does not work: {one_line(error)}"
        if device is None:
            return reason
        broken = _unusable.get(str(device))
        return f"{device} failed earlier in this process: {broken}" if broken else ""

    @property
    def needed_mib(self) -> float:
        """What a move to the GPU takes: weights, room for activations, and a context that is not yet paid for.

        Before `prepare` the weights are an estimate.  The same wherever CLIP is at the moment.
        """
        if not self._managed or self._closed:
            return 0.0
        weights = self._weights
        size = UNLOADED_WEIGHTS_MIB if weights is None else weights.nbytes / MIB
        return size + ACTIVATIONS_MIB + (0.0 if self._is_context_paid() else CONTEXT_MIB)

    @property
    def held_mib(self) -> float:
        """What a move to the CPU gives back: the copy and what torch's allocator keeps cached.  Not the context."""
        weights = self._weights
        if weights is None or not weights.uploaded or self._choice is None or self._choice[0] is None:
            return 0.0
        device = self._choice[0]
        if str(device) in _unusable:
            return 0.0
        size = weights.nbytes
        reserved, allocated = _memory(device, "memory_reserved"), _memory(device, "memory_allocated")
        cached = reserved - allocated if reserved is not None and allocated is not None else 0
        return (size + max(0, cached)) / MIB

    @property
    def context_mib(self) -> float | None:
        """What this process keeps on the card for life besides the weights, measured at the first move up.

        No move gives it back, only the end of the process.  0 before the first move; None where it was not measured,
        because the driver does not tell or a neighbour moved more at that moment.
        """
        return self._context_mib if self._is_context_paid() else 0.0

    def card_memory(self) -> tuple[float, float, Literal["card", "process"]] | None:
        """Total and free memory by torch, in MiB, and what they cover; None unless the context is paid already.

        Never raises.  Only CUDA's figures see other processes; free memory that equals the total cannot be true with
        a context on the card (some ROCm versions say so), and is no answer.
        """
        device = self._choice[0] if self._choice else None
        if device is None or str(device) in _unusable or self._closed or not self._is_context_paid():
            return None
        try:
            function = _device_function(device, "mem_get_info") or _device_function(device, "get_memory_info")
            free, total = (int(figure) for figure in function(device)) if function is not None else (0, 0)
        except Exception as error:
            log.debug("torch does not tell the memory of %s: %s", device, one_line(error))
            return None
        if not 0 <= free < total:
            return None
        return total / MIB, free / MIB, "card" if device.type == "cuda" else "process"

    # --- moves -------------------------------------------------------------------------------------------------------

    def to_gpu(self) -> None:
        """Move up, all or nothing, and prove it with a reference embedding.

        Raises `ClipOutOfMemory`, `CudaPoisoned` (this process cannot use the device again), `ClipUnavailable` or
        `ClipError`; CLIP is then on the CPU as before, and the memory has been given back.
        """
        self.prepare()
        with self._exclusive():
            weights = self._weights
            if weights is None:
                raise self._gone()
            device, reason = self._chosen()
            if device is None:
                raise ClipUnavailable(detail=f"CLIP cannot go to a GPU: {reason}")
            if str(device) in _unusable:
                raise _poisoned(device)
            if weights.uploaded and weights.devices() == {device}:
                return
            failure: GPUFSMError | None = None
            free_mib = None if self._is_context_paid() else self._free_mib()
            try:
                weights.upload(device)
                self._context_paid = True
                self._compare_canary(device)
                self._measure_context(device, free_mib)
            except GPUFSMError as error:
                failure = error
                weights.drop()
            except Exception as error:
                failure = self._translate(error, device, moving=True)
            except BaseException as error:
                # An interrupt: the model must not stay half bound, nor the traceback keep the copy alive.
                traceback.clear_frames(error.__traceback__)
                weights.drop()
                _empty_cache(device)
                raise
            if failure is not None:
                _empty_cache(device)
        # Outside the handler, so that no `__context__` refers to frames that refer to the device's memory.
        if failure is not None:
            raise failure

    def _free_mib(self) -> float | None:
        return None if self.measure_free_mib is None else self.measure_free_mib()

    def _measure_context(self, device: torch.device, before_mib: float | None) -> None:
        """What went besides the allocator's own segments; after the canary, which loads kernels and workspaces."""
        if before_mib is None:
            return
        after_mib, reserved = self._free_mib(), _memory(device, "memory_reserved")
        if after_mib is None or reserved is None:
            return
        left = before_mib - after_mib - reserved / MIB
        if 0.0 <= left <= CONTEXT_MAX_MIB:
            self._context_mib = left

    def to_cpu(self) -> None:
        """Move down: bind the master, drop the copy, empty the cache.  Idempotent; copies nothing.

        Raises `ClipError` if an encode does not end within `drain_timeout_s`, or if the weights have been changed.
        """
        if not self._is_ready():
            return
        self._check_process()
        with self._exclusive():
            weights = self._weights
            if weights is None:
                return
            if not weights.uploaded and all(device.type == "cpu" for device in weights.devices()):
                return
            self._down(weights)
            self._compare_canary(None)

    def _down(self, weights: _Weights) -> None:
        import torch

        device = self._choice[0] if self._choice else None
        if device is not None and weights.uploaded and str(device) not in _unusable:
            try:
                torch.accelerator.synchronize(device)
            except Exception as error:
                self._poison(device, error)
        weights.drop()
        if device is not None:
            _empty_cache(device)

    # --- encoding ----------------------------------------------------------------------------------------------------

    def encode(
        self,
        items: Sequence[object],
        *,
        batch_size: int = 32,
        normalize: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Embeddings:
        """Embed images and texts, in order; from any thread.

        `progress(done, total)` is called in this thread after every batch, with no lock held.

        An item is a text (`str`, always taken as text and never as a file or an address), or an image: a PIL image of
        any mode, a `pathlib.Path`, the bytes of an image file, or a numpy array of uint8 and shape (h, w, 3).

        Returns float32 of shape (n, d), of unit length with `normalize`; (0, d) for no items.  Raises `BadArgument`
        for an item that is none of these, `ClipOutOfMemory`, `CudaPoisoned`, `ClipUnavailable`, `ClipError`.
        """
        _check_call(items, batch_size)
        self.prepare()
        import numpy as np

        assert self._canary is not None
        texts = [index for index, item in enumerate(items) if isinstance(item, str)]
        images = [index for index, item in enumerate(items) if not isinstance(item, str)]
        for kind, indices in (("text", texts), ("image", images)):
            if indices and kind not in self._modalities:
                raise BadArgument(detail=f"item {indices[0]}: this model embeds no {kind}s")
        vectors = np.empty((len(items), self._canary.shape[1]), dtype=np.float32)
        done = 0
        for indices in (texts, images):  # one call of the model takes one kind only
            for start in range(0, len(indices), batch_size):
                chunk = indices[start : start + batch_size]
                batch = [_as_input(items[index], index) for index in chunk]
                with self._lock:
                    vectors[chunk] = self._embed(batch)
                done += len(chunk)
                if progress is not None:
                    progress(done, len(items))
        return _unit(vectors) if normalize else vectors

    def _embed(self, batch: Sequence[object]) -> Embeddings:
        """Run the model on one batch of one kind; the lock is held.  Errors of the device are told from others."""
        if self._model is None:
            raise self._gone()
        assert self._weights is not None
        device = next((device for device in self._weights.devices() if device.type != "cpu"), None)
        failure: GPUFSMError | None = None
        vectors: Embeddings | None = None
        try:
            vectors = self._run(batch, on_cpu=device is None)
        except Exception as error:
            failure = self._translate(error, device, moving=False)
        if failure is not None:
            raise failure
        assert vectors is not None
        return vectors

    def _run(self, batch: Sequence[object], *, on_cpu: bool) -> Embeddings:
        import numpy as np

        with _bounded_threads() if on_cpu else contextlib.nullcontext():
            raw = self._model.encode(
                batch,
                batch_size=len(batch),
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=False,
            )
        vectors: Embeddings = np.asarray(raw, dtype=np.float32)
        wanted = (len(batch), vectors.shape[-1] if self._canary is None else self._canary.shape[1])
        if vectors.shape != wanted:
            raise ClipError(detail=f"the model returned vectors of shape {vectors.shape} where {wanted} was due")
        if not np.isfinite(vectors).all():
            raise ClipError(
                detail="the model's embeddings are not finite",
                remedy="Keep CLIP on the CPU (clip_device='cpu') if it happens again; check the GPU and its driver.",
            )
        return vectors

    # --- loading -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Load the model onto the CPU and take its weights over.  Idempotent; seconds on the first call.

        Raises `ClipUnavailable` (a package or the weights are missing, or the weights are refused) and, for a
        `clip_device` that torch does not know, `ConfigError`.
        """
        self._check_process()
        if self._is_ready():
            return
        with self._loading:
            if self._is_ready():  # another thread loaded it meanwhile
                return
            if self._closed or not self._managed:
                raise self._gone()
            self._unavailable = None
            try:
                self._prepare()
            except ClipUnavailable as error:
                self._unavailable = error
                raise

    def _is_ready(self) -> bool:
        return self._weights is not None

    def _prepare(self) -> None:
        if self._given is None:
            model = self._load()
        else:
            self._import()
            model = self._given
        device, reason = self._chosen()
        if device is None and reason.startswith("no such device"):
            raise ConfigError(name="clip_device", source="settings", detail=reason)
        try:
            weights = _Weights(model)
        except GPUFSMError:
            raise
        except Exception as error:
            raise ClipUnavailable(detail=f"the weights cannot be taken over: {one_line(error)}") from error
        model.eval()
        self._model = model
        self._modalities = frozenset(getattr(model, "modalities", ("text", "image"))) & {"text", "image"}
        try:
            self._canary = self._sing()
        except Exception as error:
            self._model = None
            raise ClipUnavailable(detail=f"the model loads but does not work: {one_line(error)}") from error
        self._weights = weights

    def _load(self) -> Any:
        pipeline = self._import()
        name = self._config.clip_model
        assert name is not None
        allowed = self._config.allow_pickle_weights
        folder = _find(name, pickles=allowed)
        _check_weights(folder, name, allowed=allowed)
        try:
            with _no_bars():
                return pipeline(
                    str(folder),
                    device="cpu",
                    trust_remote_code=False,
                    local_files_only=True,
                    model_kwargs={} if allowed else {"use_safetensors": True},
                )
        except Exception as error:
            raise ClipUnavailable(
                detail=f"{one_line(name)} cannot be loaded: {one_line(error)}",
                remedy="Set clip_model to the name or folder of a sentence-transformers CLIP.",
            ) from error

    def _import(self) -> Any:
        try:
            import PIL.Image  # noqa: F401
            import sentence_transformers
            import torch  # noqa: F401
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("torch", "sentence_transformers", "PIL"):
                raise self._missing(package) from None
            raise self._broken(error) from error
        except Exception as error:
            raise self._broken(error) from error
        version = str(sentence_transformers.__version__)
        if int(version.partition(".")[0]) < 6:
            raise ClipUnavailable(
                detail=f"sentence-transformers {version} moves models by itself; 6.0 is the least that works",
                remedy=INSTALL,
            )
        return sentence_transformers.SentenceTransformer

    @staticmethod
    def _missing(package: str) -> ClipUnavailable:
        return ClipUnavailable(detail=f"CLIP needs the package {package}, which is not installed", remedy=INSTALL)

    @staticmethod
    def _broken(error: Exception) -> ClipUnavailable:
        return ClipUnavailable(
            detail=f"sentence-transformers cannot be imported: {one_line(error)}",
            remedy="A torchvision that does not match torch is the usual cause: uninstall it, CLIP does not need it.",
        )

    # --- which device ------------------------------------------------------------------------------------------------

    def _chosen(self) -> tuple[torch.device | None, str]:
        """The device to go to, or None and why there is none.  Decided once."""
        if self._choice is None:
            self._choice = _choose_device(self._config.clip_device)
        return self._choice

    def _is_context_paid(self) -> bool:
        if self._context_paid:
            return True
        choice = self._choice
        if choice is None or choice[0] is None:
            return False
        return bool(_memory(choice[0], "memory_reserved"))

    # --- proof and failure -------------------------------------------------------------------------------------------

    def _sing(self) -> Embeddings:
        """Embed the fixed reference inputs, one for each kind that the model knows; unit length."""
        import numpy as np
        from PIL import Image

        rows: list[Embeddings] = []
        on_cpu = self._weights is None or not self._weights.uploaded
        if "text" in self._modalities:
            rows.append(self._run([{"text": "a window with two buttons"}], on_cpu=on_cpu))
        if "image" in self._modalities:
            pixels = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) * 97 % 251
            rows.append(self._run([Image.fromarray(pixels.astype(np.uint8))], on_cpu=on_cpu))
        return _unit(np.concatenate(rows))

    def _compare_canary(self, device: torch.device | None) -> None:
        """Raise unless the reference inputs still give the reference vectors; the lock is held."""
        import numpy as np

        assert self._canary is not None
        cosines = np.sum(self._sing() * self._canary, axis=1)
        if not bool((cosines >= SAME).all()):
            raise ClipError(
                detail=f"embeddings on {device or 'the CPU'} differ from the reference: "
                f"cosine {float(cosines.min()):.6f}, least allowed {SAME}",
                remedy="Keep CLIP on the CPU (clip_device='cpu'), and check the GPU and its driver.",
            )

    def _translate(self, error: Exception, device: torch.device | None, *, moving: bool) -> GPUFSMError:
        """Make an error of ours from a foreign one, and leave the model whole and the memory free."""
        import torch

        # The frames of the traceback hold what the device ran out of.
        traceback.clear_frames(error.__traceback__)
        weights = self._weights
        assert weights is not None or device is None
        if device is not None and weights is not None:
            if isinstance(error, torch.OutOfMemoryError) or _says_out_of_memory(error):
                if moving:
                    weights.drop()
                _empty_cache(device)
                what = "the move to" if moving else "a batch on"
                return ClipOutOfMemory(
                    detail=f"{what} {device} ran out of memory: {one_line(error)}",
                    remedy="" if moving else "Use a smaller batch_size.",
                    needed_mib=self.needed_mib if moving else 0.0,
                )
            # During a move every runtime error is the device's: the same work has been done on the CPU before.
            broken = (moving and isinstance(error, RuntimeError)) or not _answers(device, error)
            if broken:
                self._poison(device, error)
            if moving or broken:
                weights.drop()
                _empty_cache(device)
            if broken:
                return _poisoned(device)
        if isinstance(error, GPUFSMError):
            return error
        failure = ClipError(detail=f"CLIP could not embed: {one_line(error)}")
        failure.__cause__ = error
        return failure

    def _poison(self, device: torch.device, error: Exception) -> None:
        _unusable.setdefault(str(device), one_line(error))
        log.error("%s cannot be used again in this process: %s", device, one_line(error))

    def _gone(self) -> GPUFSMError:
        if self._closed:
            return ManagerClosed(detail="CLIP has been closed")
        return ClipUnavailable(detail="no CLIP is managed", remedy="Set clip_model.")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcess(
                detail="this CLIP belongs to the parent process", remedy="Make a new manager after the fork, or spawn."
            )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep encodes out during a move; the wait is bounded, because a move is asked for by the driver."""
        patience_s = self._config.drain_timeout_s
        if not self._lock.acquire(timeout=patience_s):
            raise ClipError(detail=f"an encode has been running for more than {patience_s:g} s; CLIP was not moved")
        try:
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        """Move down and let go of the model.  Idempotent; never raises."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        try:
            with self._exclusive():
                weights, self._weights, self._model, self._given = self._weights, None, None, None
                if weights is not None:
                    if weights.uploaded:
                        self._down(weights)
                    weights.unpin()
        except Exception as error:
            log.warning("CLIP was not given back whole: %s", one_line(error))


# --- torch, device by device -----------------------------------------------------------------------------------------


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(device)


def _choose_device(wanted: str) -> tuple[torch.device | None, str]:
    """Resolve `clip_device`; the device carries its index, so that no thread's default can redirect it."""
    if wanted == "cpu":
        return None, "the settings keep CLIP on the CPU (clip_device='cpu')"
    if importlib.util.find_spec("torch") is None:
        return None, f"torch is not installed. {INSTALL}"
    import torch

    if wanted == "auto":
        for kind in ("cuda", "mps", "xpu"):
            with contextlib.suppress(Exception):
                if torch.get_device_module(kind).is_available():
                    return torch.device(kind, 0), ""
        built = "" if torch.version.cuda or torch.version.hip else " (this torch is built without GPU support)"
        return None, f"torch reports no GPU{built}"
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError):
        return None, f"no such device: torch knows no {one_line(repr(wanted))}"
    if device.type in ("cpu", "meta"):
        return None, f"{device.type} is no GPU"
    index = device.index or 0
    try:
        module = torch.get_device_module(device.type)
        count = int(module.device_count()) if module.is_available() else 0
    except Exception as error:
        return None, f"{one_line(wanted)} is not available: {one_line(error)}"
    if index >= count:
        return None, f"{one_line(wanted)} is not available: torch reports {count} {device.type} devices"
    return torch.device(device.type, index), ""


def _device_function(device: torch.device, name: str) -> Callable[..., Any] | None:
    """`torch.cuda.NAME` and its like, else the accelerator-neutral one."""
    import torch

    found = getattr(torch.get_device_module(device.type), name, None) or getattr(torch.accelerator, name, None)
    return found if callable(found) else None


def _memory(device: torch.device, name: str) -> int | None:
    """A figure of torch's allocator in bytes; None where the backend does not keep it.  Makes no context."""
    try:
        function = _device_function(device, name)
        return None if function is None else int(function(device))
    except Exception:
        return None


def _empty_cache(device: torch.device) -> None:
    """Give cached blocks back to the driver.  A device that no longer answers is not worth an exception here."""
    with contextlib.suppress(Exception):
        function = _device_function(device, "empty_cache")
        if function is not None:
            function()


def _says_out_of_memory(error: Exception) -> bool:
    # Making the context or cuBLAS's workspace can run out too, and that arrives as a plain error of the runtime.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "status_alloc_failed" in text)


def _answers(device: torch.device, error: Exception) -> bool:
    """Tell a bad input from a broken device: after a sticky error the smallest piece of work fails too."""
    import torch

    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return False
    try:
        with torch.inference_mode(False), torch.no_grad():
            alive = bool(torch.ones(8, device=device).cpu().sum().item() == 8.0)
        torch.accelerator.synchronize(device)
    except Exception as again:
        return _says_out_of_memory(again)
    return alive


def _poisoned(device: torch.device) -> CudaPoisoned:
    return CudaPoisoned(
        detail=f"{device} failed and cannot be used again in this process: {_unusable.get(str(device), '')}",
        remedy="CLIP serves on from the CPU; restart the program to use the GPU again.",
    )


@contextlib.contextmanager
def _bounded_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if before <= CPU_THREADS:
        yield
        return
    torch.set_num_threads(CPU_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- inputs ----------------------------------------------------------------------------------------------------------


def _unit(vectors: Embeddings) -> Embeddings:
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Embeddings = vectors / np.maximum(lengths, np.float32(1e-12))
    return unit


def _check_call(items: object, batch_size: object) -> None:
    if isinstance(items, str | bytes | bytearray) or not isinstance(items, Sequence):
        raise BadArgument(
            detail=f"encode takes a list of items, not one {type(items).__name__}", remedy="Write encode([item])."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= 1024:
        raise BadArgument(detail=f"batch_size={one_line(repr(batch_size))} is no integer from 1 to 1024")


def _as_input(item: object, index: int) -> object:
    """What the model is given for one item: a text can never be taken for an address, nor an image for a path."""
    import numpy as np
    from PIL import Image

    if isinstance(item, str):
        return {"text": item}
    try:
        if isinstance(item, Image.Image):
            return _rgb(item)
        if isinstance(item, np.ndarray):
            if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or 0 in item.shape:
                raise BadArgument(
                    detail=f"item {index}: an array of {item.dtype} and shape {item.shape} is no image",
                    remedy="Give uint8 of shape (height, width, 3).",
                )
            return Image.fromarray(np.ascontiguousarray(item))
        if isinstance(item, bytes | bytearray | memoryview):
            with Image.open(io.BytesIO(item)) as image:
                return _rgb(image)
        if isinstance(item, Path):
            with Image.open(item) as image:
                return _rgb(image)
    except BadArgument:
        raise
    except Exception as error:
        name = one_line(str(item)) if isinstance(item, Path) else type(item).__name__
        raise BadArgument(detail=f"item {index} ({name}) cannot be read as an image: {one_line(error)}") from None
    raise BadArgument(
        detail=f"item {index}: a {type(item).__name__} is neither text nor image",
        remedy="Give str, PIL images, numpy arrays (h, w, 3) of uint8, bytes of image files, or pathlib.Path.",
    )


def _rgb(image: Any) -> Any:
    """Any PIL image as RGB, 8 bits; 16-bit and float greys are scaled, since PIL would cut them off at 255."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16") or grey.max(initial=0.0) > 255:
            grey = grey / 257.0
        return Image.fromarray(np.clip(np.nan_to_num(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")
    # A copy in every case: the caller may close or paint over its own.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


# --- weights on disk -------------------------------------------------------------------------------------------------


def _find(name: str, *, pickles: bool) -> Path:
    """The folder that holds the model: as given, or from the hub's cache, downloaded first where that is possible."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "~", "/", "\\")) or "\\" in name or name.count("/") > 1:
        raise ClipUnavailable(
            detail=f"there is no folder {one_line(name)}", remedy="Set clip_model to a model's name or its folder."
        )
    import huggingface_hub

    repository = name if "/" in name else f"sentence-transformers/{name}"
    unwanted = ["*.onnx*", "*.h5", "*.msgpack", "*.ot", "openvino/*", "onnx/*", *([] if pickles else sorted(_globs()))]
    log.info("looking for %s in the local cache and at the Hugging Face hub", one_line(repository))
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, ignore_patterns=unwanted, tqdm_class=_logged_progress())
        )
    except Exception as error:
        raise ClipUnavailable(
            detail=f"{one_line(repository)} is not on this machine and cannot be fetched: {one_line(error)}",
            remedy="Go online once, or download the model elsewhere and set clip_model to its folder.",
        ) from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing its own progress meanwhile: a library leaves the terminal alone."""
    theirs: Any = sys.modules.get("transformers.utils.logging")
    if theirs is None or not theirs.is_progress_bar_enabled():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hub's own switch in the environment wins over this one, and says so
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.enable_progress_bar()


def _logged_progress() -> Any:
    """A progress bar for the hub's downloads that writes log records: a library leaves the terminal alone."""
    tqdm: Any = importlib.import_module("tqdm.auto").tqdm

    told = (0, 0)
    """Size and tenth: the hub counts in two bars, and learns the size of a file only when it begins with it."""

    class Logged(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # of the hub's own class
            # Not `disable`: a disabled bar does not count.
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            nonlocal told
            now = (round(self.total / MIB), int(10 * self.n / self.total)) if self.total else (0, 0)
            if self.unit == "B" and now[1] and now > told:
                told = now
                log.info("CLIP's weights: %d %% of %d MiB fetched", 10 * now[1], now[0])
            return shown

    return Logged


def _globs() -> set[str]:
    return {f"*{suffix}" for suffix in PICKLES}


def _check_weights(folder: Path, name: str, *, allowed: bool) -> None:
    """Refuse weights that are pickles: loading one can run any program.  Allowed, they need a torch that is safe."""
    modules = [folder]
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        listed = json.loads((folder / "modules.json").read_text("utf-8"))
        modules += [folder / str(module["path"]) for module in listed if module["path"]]
    files = [file for module in modules if module.is_dir() for file in module.iterdir()]
    safe = {file.parent for file in files if file.suffix == ".safetensors"}
    pickled = sorted(file for file in files if file.suffix in PICKLES and file.parent not in safe)
    if not allowed and pickled:
        raise ClipUnavailable(
            detail=f"the weights of {one_line(name)} are a pickle ({one_line(pickled[0].name)}), which can run code",
            remedy="Use a model with safetensors, or set allow_pickle_weights=True if you trust its source.",
        )
    if not allowed and not safe:
        raise ClipUnavailable(
            detail=f"{one_line(name)} has no safetensors weights here",
            remedy="If it has pickled weights only, allow_pickle_weights=True accepts them from a trusted source.",
        )
    if pickled:
        import torch

        release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if release < (2, 10):
            raise ClipUnavailable(
                detail=f"torch {torch.__version__} can be made to run code by pickled weights",
                remedy="Use torch 2.10 or later, or a model with safetensors.",
            )
