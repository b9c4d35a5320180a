"""CLIP's host: real sentence-transformers, real torch moves to a second device that needs no GPU."""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
)
from gpu_fsm.ports import CLIPHost
from gpu_fsm.settings import GPUResourceConfig

pytestmark = [pytest.mark.core, pytest.mark.needs_torch]
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from gpu_fsm import clip as clip_module  # noqa: E402
from gpu_fsm.clip import ACTIVATIONS_MIB, CONTEXT_MIB, CPU_THREADS, CLIPManager, _Weights  # noqa: E402
from gpu_fsm.vram import VRAMMonitor  # noqa: E402
from tests import bench_clip  # noqa: E402
from tests.tools import building, fake_nvml, fakegpu, tiny_clip  # noqa: E402
from tests.tools.fake_nvml import FakeNVML  # noqa: E402
from tests.tools.fakegpu import FakeGPU  # noqa: E402

needs_device = building.needs(fakegpu.missing())


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """No test may fetch anything."""
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of the real architecture on disk."""
    return tiny_clip.build(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """The second device: 64 MiB, a context of 8, nothing broken."""
    device = fakegpu.load()
    device.reset(total_mib=64, context_mib=8)
    monkeypatch.setattr(clip_module, "_unusable", {})
    yield device
    device.reset()


Making = Callable[..., CLIPManager]


@pytest.fixture(scope="session")
def loaded(tiny: Path) -> Any:
    """The tiny CLIP in memory, to be copied: loading takes half a second."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny), device="cpu", local_files_only=True)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Making]:
    """Make hosts that are closed afterwards: a copy of the tiny CLIP and the CPU only, unless told otherwise."""
    made: list[CLIPManager] = []

    def build(*, model: Any = None, **config: Any) -> CLIPManager:
        if model is None and "clip_model" not in config:
            model = copy.deepcopy(request.getfixturevalue("loaded"))
        device = "fakegpu:0" if "gpu" in request.fixturenames else "cpu"
        config = {"clip_device": device, "drain_timeout_s": 5.0, **config}
        made.append(CLIPManager(GPUResourceConfig(**config), model=model))
        return made[-1]

    yield build
    for host in made:
        host.close()


class Stub(torch.nn.Module):  # type: ignore[misc]
    """The least that looks like a SentenceTransformer: a tied weight, two kinds of buffers, an `encode` to disturb."""

    modalities = ("text",)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first = torch.nn.Linear(8, 8, bias=False)
        self.second = torch.nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(8, 8, generator=generator))
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.ones(8))
        self.register_buffer("unsaved", torch.arange(8.0), persistent=False)
        self.register_buffer("scalar", torch.tensor(2.0))
        self.register_buffer("nothing", None)
        self.disturb: Callable[[Stub], None] = lambda stub: None

    @property
    def where(self) -> str:
        return str(self.first.weight.device.type)

    def encode(self, batch: Sequence[Any], **kwargs: object) -> Any:
        self.disturb(self)
        bytes_of = [hashlib.sha256(item["text"].encode()).digest()[:8] for item in batch]
        rows = torch.tensor([list(row) for row in bytes_of], dtype=torch.float32, device=self.first.weight.device)
        with torch.inference_mode():
            return (self.second(self.first(rows)) * self.kept + self.unsaved * self.scalar).cpu().numpy()


class RealClock:
    """The machine's own monotonic time."""

    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        condition.wait(timeout_s)


def picture(colour: str = "red", size: tuple[int, int] = (48, 40)) -> Image.Image:
    """One plain image."""
    return Image.new("RGB", size, colour)


def png(image: Image.Image) -> bytes:
    """The image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def master_of(host: CLIPManager) -> str:
    """A digest of the weights on the CPU."""
    assert host._weights is not None
    return hashlib.sha256(host._weights._master.numpy().tobytes()).hexdigest()


ITEMS: list[object] = ["a window", picture("blue"), "", picture("green")]

# --- loading ---------------------------------------------------------------------------------------------------------


def test_loading_leaves_the_terminal_alone(
    make: Making, tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does is told in log records; transformers draws no bars of its own, and again does for others later."""
    from transformers.utils import logging as theirs

    monkeypatch.setattr(theirs, "_tqdm_active", True)
    make(clip_model=str(tiny)).prepare()
    assert capfd.readouterr() == ("", "")
    assert theirs.is_progress_bar_enabled()


def test_the_module_imports_no_torch() -> None:
    """Importing and making a host costs nothing heavy; the first use pays."""
    code = (
        "import sys; from gpu_fsm.clip import CLIPManager; from gpu_fsm.settings import GPUResourceConfig;"
        "h = CLIPManager(GPUResourceConfig(clip_device='cpu')); assert (h.place, h.device) == ('cpu', 'cpu');"
        "assert not h.gpu_usable; h.close();"
        "print([m for m in ('torch', 'sentence_transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_the_host_keeps_the_ports_promise(make: Making) -> None:
    """`CLIPManager` is a `CLIPHost`, and says that it is no simulation."""
    host: CLIPHost = make()
    assert host.simulated is False
    assert host.place == "cpu"
    host.prepare()  # type: ignore[attr-defined]
    assert (host.place, host.device, host.held_mib) == ("cpu", "cpu", 0.0)


def test_a_model_is_loaded_onto_the_cpu_whatever_the_default_device(make: Making, tiny: Path, monkeypatch: Any) -> None:
    """Row C12: the constructor is told `cpu`, and no remote code."""
    import sentence_transformers

    seen: dict[str, Any] = {}
    real = sentence_transformers.SentenceTransformer

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", spy)
    make(clip_model=str(tiny)).prepare()
    assert (seen["device"], seen["trust_remote_code"], seen["local_files_only"]) == ("cpu", False, True)


def test_the_published_layout_of_clip_models_loads(make: Making, tmp_path: Path) -> None:
    """`modules.json` with one `0_CLIPModel` inside, as the models of that name have it."""
    tiny_clip.build(tmp_path / "published" / "0_CLIPModel")
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (tmp_path / "published" / "modules.json").write_text(json.dumps([module]))
    host = make(clip_model=str(tmp_path / "published"))
    assert np.allclose(host.encode(ITEMS), make().encode(ITEMS), atol=1e-6)


def test_a_model_in_the_hubs_cache_is_found_offline(
    make: Making, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare name stands for sentence-transformers' own; what was fetched once needs no network."""
    import huggingface_hub.constants

    cache = tmp_path / "models--sentence-transformers--tiny"
    tiny_clip.build(cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert make(clip_model="tiny").encode(ITEMS).shape == (4, 16)


def test_no_clip_is_managed_without_a_name(make: Making) -> None:
    """`clip_model=None`: place and device are none, and asking for an embedding says what to set."""
    host = make(clip_model=None)
    assert (host.place, host.device, host.gpu_usable, host.needed_mib) == ("none", "none", False, 0.0)
    with pytest.raises(ClipUnavailable, match="clip_model"):
        host.encode(["x"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("/no/such/folder", "no folder", id="missing_folder"),
        pytest.param("clip-ViT-B-32", "Go online once", id="hub_name_offline"),
        pytest.param("tests/data", "no safetensors", id="folder_of_something_else"),
    ],
)
def test_weights_that_are_not_there_are_named_with_the_mend(make: Making, name: str, words: str) -> None:
    """One clear sentence, and CLIP is nowhere from then on."""
    host = make(clip_model=name)
    with pytest.raises(ClipUnavailable, match=words):
        host.prepare()
    assert (host.place, host.gpu_usable) == ("none", False)
    with pytest.raises(ClipUnavailable):
        host.to_gpu()


@pytest.mark.parametrize("package", ["torch", "sentence_transformers", "PIL"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    make: Making, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """`pip install "gpu-fsm[clip]"`, not a traceback."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.Image", None)
    with pytest.raises(ClipUnavailable, match=r'pip install "gpu-fsm\[clip\]"'):
        make(model=object()).prepare()


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_by_the_name_of_their_setting(make: Making, tmp_path: Path) -> None:
    """Without permission a pickle is not opened; with it, plain weights load and give the same model."""
    folder = tiny_clip.build(tmp_path / "pickled", safetensors=False)
    with pytest.raises(ClipUnavailable, match="allow_pickle_weights"):
        make(clip_model=str(folder)).prepare()
    allowed = make(clip_model=str(folder), allow_pickle_weights=True)
    assert np.array_equal(allowed.encode(ITEMS), make().encode(ITEMS))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_malicious_pickle_does_not_run(make: Making, tmp_path: Path, allowed: bool) -> None:
    """Refused, or with permission loaded as weights only: the code in it never runs."""
    folder = tiny_clip.build(tmp_path / "evil", safetensors=False)
    torch.save({"weight": Trap(tmp_path / "trapped")}, folder / "pytorch_model.bin")
    with pytest.raises(ClipUnavailable):
        make(clip_model=str(folder), allow_pickle_weights=allowed).prepare()
    assert not (tmp_path / "trapped").exists()


def test_pickles_in_a_part_of_the_model_are_found(make: Making, tmp_path: Path) -> None:
    """A safe first module does not vouch for the others that `modules.json` lists."""
    folder = tiny_clip.build(tmp_path / "parts")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    with pytest.raises(ClipUnavailable, match="pickle"):
        make(clip_model=str(folder)).prepare()


# --- what is embedded ------------------------------------------------------------------------------------------------


def test_images_and_texts_come_back_in_order_as_float32_of_unit_length(make: Making) -> None:
    """Mixed lists are split inside and put together again; batches do not matter beyond rounding."""
    host = make()
    together = host.encode(ITEMS)
    assert together.shape == (4, 16)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    one_by_one = np.concatenate([host.encode([item]) for item in ITEMS])
    assert np.allclose(together, one_by_one, rtol=1e-5, atol=1e-6)
    assert np.allclose(together, host.encode(ITEMS, batch_size=1), rtol=1e-5, atol=1e-6)
    raw = host.encode(ITEMS, normalize=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1.0, atol=1e-3)
    assert np.allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), together, atol=1e-6)


def test_nothing_embeds_to_no_rows(make: Making) -> None:
    """(0, d), so that callers can stack it."""
    vectors = make().encode([])
    assert vectors.shape == (0, 16)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_an_image_of_any_mode_is_embedded_as_its_colours(make: Making, mode: str) -> None:
    """Every mode of PIL gives the vector of the same picture as RGB."""
    image = Image.new(mode, (40, 32))
    image.paste(1 if mode == "1" else image.getpixel((0, 0)), (4, 4, 20, 20))
    host = make()
    plain = image.convert("RGBA").convert("RGB") if mode in ("P", "PA") else image.convert("RGB")
    assert np.array_equal(host.encode([image]), host.encode([plain]))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_deep_grey_is_scaled_not_cut_off(make: Making, mode: str) -> None:
    """PIL would make everything above 255 white; a gradient stays a gradient."""
    ramp = np.tile(np.arange(0, 65536, 2048, dtype=np.uint16), (32, 1))
    kinds: dict[str, Any] = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    deep = Image.fromarray(ramp.astype(kinds[mode]))
    assert deep.mode == mode
    host = make()
    assert np.array_equal(host.encode([deep]), host.encode([Image.fromarray((ramp // 257).astype(np.uint8))]))


def test_an_image_may_come_as_pixels_bytes_or_path(make: Making, tmp_path: Path) -> None:
    """The same picture, the same vector."""
    image = picture("orange")
    path = tmp_path / "orange.png"
    path.write_bytes(png(image))
    vectors = make().encode([image, np.asarray(image), png(image), path, bytearray(png(image))])
    assert np.allclose(vectors, vectors[0], rtol=1e-5, atol=1e-6)


def test_the_callers_image_is_left_alone(make: Making) -> None:
    """No mode change, no closed file."""
    image = Image.open(io.BytesIO(png(picture())))
    make().encode([image])
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_text_is_never_taken_for_a_file_or_an_address(
    make: Making, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A str that names an existing picture, or an address of one, is embedded as the words it is; nothing is opened."""
    path = tmp_path / "screen.png"
    path.write_bytes(png(picture("blue")))
    host = make()
    host.prepare()
    image = host.encode([path])[0]

    def no_network(*args: object) -> None:
        raise AssertionError(f"a name was looked up: {args[0]}")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    texts = [str(path), "http://example.invalid/a.png", "data:image/png;base64,AAAA"]
    vectors = host.encode(texts)
    assert float(vectors[0] @ image) < 0.99
    assert host._model is not None
    direct = host._model.encode([{"text": text} for text in texts], show_progress_bar=False)
    direct /= np.linalg.norm(direct, axis=1, keepdims=True)
    assert np.allclose(vectors, direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        pytest.param(None, "NoneType", id="none"),
        pytest.param(3, "int", id="number"),
        pytest.param({"text": "x"}, "dict", id="mapping"),
        pytest.param(b"not an image", "cannot be read", id="bytes_of_no_image"),
        pytest.param(png(Image.effect_noise((40, 32), 50))[:90], "cannot be read", id="torn_image"),
        pytest.param(Path("/no/such.png"), "no/such.png", id="missing_file"),
        pytest.param(np.zeros((3, 8, 8), np.uint8), "shape", id="channels_first"),
        pytest.param(np.zeros((8, 8, 3), np.float32), "float32", id="float_pixels"),
        pytest.param(np.zeros((0, 8, 3), np.uint8), "shape", id="empty_pixels"),
    ],
)
def test_what_is_neither_text_nor_image_is_refused_by_its_index(make: Making, item: object, words: str) -> None:
    """The message names the item's place, and nothing is embedded."""
    with pytest.raises(BadArgument, match=rf"item 1.*{words}"):
        make().encode(["fine", item])


@pytest.mark.parametrize("items", ["text", b"bytes", picture(), Path("x"), 5, iter(["x"])], ids=type)
def test_one_item_is_not_a_list(make: Making, items: Any) -> None:
    """A text would be embedded letter by letter."""
    with pytest.raises(BadArgument, match=r"encode\(\[item\]\)"):
        make().encode(items)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "8", 5000, None])
def test_a_batch_size_that_cannot_be_meant_is_refused(make: Making, size: Any) -> None:
    """Integers from 1 to 1024."""
    with pytest.raises(BadArgument, match="batch_size"):
        make().encode(["x"], batch_size=size)


def test_encode_takes_no_device(make: Making) -> None:
    """Row C07: sentence-transformers would move the model for good."""
    assert "device" not in inspect.signature(CLIPManager.encode).parameters
    with pytest.raises(TypeError, match="device"):
        make().encode(["x"], device="cuda")  # type: ignore[call-arg]


def test_a_kind_that_the_model_does_not_know_is_refused(make: Making) -> None:
    """A text model says so before it fails inside."""
    with pytest.raises(BadArgument, match="no images"):
        make(model=Stub()).encode(["x", picture()])


def test_threads_are_bounded_on_the_cpu_and_restored(make: Making) -> None:
    """Row C13: CLIP does not take the cores of the program that it helps."""
    model, before, during = Stub(), torch.get_num_threads(), []
    model.disturb = lambda stub: during.append(torch.get_num_threads())
    try:
        torch.set_num_threads(CPU_THREADS + 3)
        make(model=model).encode(["x"])
        assert torch.get_num_threads() == CPU_THREADS + 3
    finally:
        torch.set_num_threads(before)
    assert set(during) == {CPU_THREADS}


def test_a_failing_model_is_a_clip_error_with_its_cause(make: Making) -> None:
    """Foreign exceptions do not leave the package, but can be looked at."""
    model = Stub()
    host = make(model=model)
    host.prepare()

    def fail(stub: Stub) -> None:
        raise IndexError("index out of range")

    model.disturb = fail
    with pytest.raises(ClipError, match="index out of range") as caught:
        host.encode(["x"])
    assert isinstance(caught.value.__cause__, IndexError)


# --- adoption --------------------------------------------------------------------------------------------------------


def test_adoption_changes_no_weight_and_keeps_identities(tiny: Path) -> None:
    """Same parameter objects, same values, all inside one buffer; buffers that are not saved included."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    weights = _Weights(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    low = weights._master.data_ptr()
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) == 80
    assert all(low <= t.data_ptr() < low + weights.nbytes and t.data_ptr() % 4 == 0 for t in tensors)


def test_tied_weights_take_one_place_and_stay_tied(make: Making) -> None:
    """One slot, two owners."""
    model = Stub()
    host = make(model=model)
    host.prepare()
    assert host._weights is not None
    assert len(host._weights._slots) == 4
    assert model.second.weight is model.first.weight
    assert model.nothing is None


class Wrapped(torch.Tensor):  # type: ignore[misc]
    """Stands for a quantised tensor class."""


def _hooked(model: Stub) -> Any:
    model.first._hf_hook = object()
    return model


def _parametrized(model: Stub) -> Any:
    torch.nn.utils.parametrizations.orthogonal(model.first)
    return model


def _meta(model: Stub) -> Any:
    model.kept = torch.ones(8, device="meta")
    return model


def _subclass(model: Stub) -> Any:
    model.kept = torch.ones(8).as_subclass(Wrapped)
    return model


def _inference(model: Stub) -> Any:
    with torch.inference_mode():
        model.kept = torch.ones(8)
    return model


def _sparse(model: Stub) -> Any:
    model.kept = torch.ones(8).to_sparse()
    return model


def _compiled(model: Stub) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(_hooked, "first has an accelerate hook", id="accelerate"),
        pytest.param(_parametrized, "first has parametrizations", id="parametrization"),
        pytest.param(_meta, "kept is on the meta device", id="meta"),
        pytest.param(_subclass, "kept is a Wrapped", id="tensor_subclass"),
        pytest.param(_inference, r"kept was made under torch.inference_mode\(\)", id="inference_tensor"),
        pytest.param(_sparse, "kept is sparse", id="sparse"),
        pytest.param(_compiled, "compiled", id="compiled"),
        pytest.param(lambda model: object(), "no torch module", id="no_module"),
    ],
)
def test_what_cannot_be_adopted_is_refused_by_name(make: Making, spoil: Callable[[Stub], Any], words: str) -> None:
    """The message names the module or tensor, and the model is untouched."""
    model = Stub()
    weight = model.first.weight.data_ptr()
    host = make(model=spoil(model))
    with pytest.raises(ClipUnavailable, match=words):
        host.prepare()
    assert host.place == "none"
    if spoil is not _parametrized:
        assert model.first.weight.data_ptr() == weight


# --- moves -----------------------------------------------------------------------------------------------------------


@needs_device
def test_up_is_one_allocation_and_one_copy_and_down_is_no_copy(gpu: FakeGPU, make: Making) -> None:
    """All tensors in one buffer: 80 tensors, one copy up, not a byte down, and the memory back at once."""
    host = make()
    host.prepare()
    weights = host._weights
    assert weights is not None
    weights.upload(torch.device("fakegpu:0"))
    up = gpu.figures()
    assert (up.all_allocations, up.h2d, up.h2d_bytes, up.d2h_bytes) == (1, 1, weights.nbytes, 0)
    assert weights.devices() == {torch.device("fakegpu:0")}
    host._choice = (torch.device("fakegpu:0"), "")
    host._down(weights)
    down = gpu.figures()
    assert (down.all_allocations, down.h2d, down.d2h, down.d2d) == (1, 1, 0, 0)
    assert (down.allocated, down.reserved) == (0, 0)


@needs_device
def test_embeddings_are_the_same_on_both_sides_and_bit_equal_at_home(gpu: FakeGPU, make: Making) -> None:
    """Row C14: cosine 0.9999 across devices, bits on the CPU, however many trips."""
    host = make()
    reference = host.encode(ITEMS)
    digest = master_of(host)
    parameters = list(host._model.parameters())
    for _ in range(3):
        host.to_gpu()
        assert (host.place, host.device) == ("gpu", "fakegpu:0")
        assert {str(tensor.device) for tensor in (*host._model.parameters(), *host._model.buffers())} == {"fakegpu:0"}
        away = host.encode(ITEMS)
        assert (np.sum(away * reference, axis=1) >= 0.9999).all()
        assert np.allclose(away, reference, atol=1e-4)
        host.to_cpu()
        assert (host.place, host.device) == ("cpu", "cpu")
        assert np.array_equal(host.encode(ITEMS), reference)
        assert (gpu.figures().allocated, gpu.figures().reserved) == (0, 0)
    assert master_of(host) == digest
    assert all(a is b for a, b in zip(parameters, host._model.parameters(), strict=True))


@needs_device
def test_moves_are_idempotent(gpu: FakeGPU, make: Making) -> None:
    """Being there already costs no copy."""
    host = make(model=Stub())
    host.to_cpu()
    host.to_gpu()
    before = gpu.figures()
    host.to_gpu()
    assert gpu.figures() == before
    host.to_cpu()
    host.to_cpu()
    assert host.place == "cpu"


@needs_device
@building.needs(fake_nvml.missing())
def test_the_driver_shows_the_move_and_its_undoing(gpu: FakeGPU, make: Making, tmp_path: Path) -> None:
    """Both bodies on one card: what `needed` and `held` promise is what NVML reports, and the context stays."""
    nvml = FakeNVML.create(tmp_path)
    nvml.add_gpu(total_mib=64, used_mib=10)
    host = make()
    host.prepare()
    with nvml.active():
        monitor = VRAMMonitor(GPUResourceConfig(), clock=RealClock())
        gpu.link(nvml)
        try:
            frees = [monitor.free_mib()]
            for move in (host.to_gpu, host.to_cpu):
                held = host.held_mib
                move()
                frees.append(monitor.free_mib())
        finally:
            monitor.close()
            gpu.reset(total_mib=64)
            gpu.unlink()
    before, up, down = (free for free in frees if free is not None)
    assert before == 54
    assert before - up == pytest.approx(8 + held, abs=0.01)
    assert before - down == 8


@needs_device
def test_an_error_that_is_not_the_devices_is_undone_but_not_for_life(gpu: FakeGPU, make: Making) -> None:
    """A fault of Python's in the canary says nothing about the device."""
    model = Stub()
    host = make(model=model)
    host.prepare()

    def fail(stub: Stub) -> None:
        raise LookupError("no such token")

    model.disturb = fail
    with pytest.raises(ClipError, match="no such token") as caught:
        host.to_gpu()
    assert not isinstance(caught.value, CudaPoisoned)
    assert (host.place, gpu.figures().allocated, gpu.figures().reserved) == ("cpu", 0, 0)
    model.disturb = lambda stub: None
    host.to_gpu()
    assert host.place == "gpu"


@needs_device
def test_the_context_is_planned_for_once_and_never_promised_back(gpu: FakeGPU, make: Making) -> None:
    """Row C08: before the first use the need includes a context; afterwards it is paid, and `held` leaves it out."""
    host = make()
    host.prepare()
    assert host._weights is not None
    weights_mib = host._weights.nbytes / 2**20
    assert host.needed_mib == pytest.approx(weights_mib + ACTIVATIONS_MIB + CONTEXT_MIB)
    assert host.held_mib == 0.0
    start = gpu.figures().used
    host.to_gpu()
    assert host.needed_mib == pytest.approx(weights_mib + ACTIVATIONS_MIB)
    there = gpu.figures()
    assert there.used - start == 8 * 2**20 + there.reserved
    assert host.held_mib * 2**20 == pytest.approx(there.reserved, abs=256)
    host.to_cpu()
    assert gpu.figures().used - start == 8 * 2**20
    assert host.held_mib == 0.0


@needs_device
def test_out_of_memory_at_any_allocation_leaves_everything_as_it_was(gpu: FakeGPU, make: Making) -> None:
    """Rows C01 and C02: whichever allocation of the move fails, weights or canary, nothing is split or kept.

    The exception is kept alive while the books are read: its traceback must not hold memory.
    """
    host = make(model=Stub())
    reference = host.encode(["a", "b"])
    for n in range(1000):
        gpu.fail_allocation(n)
        failure: ClipOutOfMemory | None = None
        try:
            host.to_gpu()
        except ClipOutOfMemory as error:
            failure = error
        if failure is None:
            break
        books = gpu.figures()
        assert (books.allocated, books.reserved) == (0, 0), n
        assert (host.place, host.device) == ("cpu", "cpu")
        assert failure.needed_mib > 0
        assert failure.__context__ is None
        assert np.array_equal(host.encode(["a", "b"]), reference)
    assert n > 5, "the moves never failed"
    gpu.fail_allocation(-1)
    assert host.place == "gpu"


@needs_device
def test_out_of_memory_at_any_allocation_in_the_real_architecture_is_undone(gpu: FakeGPU, make: Making) -> None:
    """The same with the tiny CLIP: the flat buffer, then every allocation inside the canary's text and image towers."""
    host = make()
    reference, one = host.encode(ITEMS), host.encode(ITEMS[:1])
    digest = master_of(host)
    n = 0
    while host.place == "cpu":
        gpu.fail_allocation(n)
        try:
            host.to_gpu()
        except ClipOutOfMemory:
            assert (gpu.figures().allocated, gpu.figures().reserved) == (0, 0), n
            assert host.device == "cpu"
            assert np.array_equal(host.encode(ITEMS[:1]), one)
        n += 1
    assert n > 100, "too few allocations for a whole move"
    host.to_cpu()
    assert np.array_equal(host.encode(ITEMS), reference)
    assert master_of(host) == digest


@needs_device
def test_a_model_of_full_size_goes_up_in_one_copy_and_down_in_none(gpu: FakeGPU) -> None:
    """151 million parameters: 1 allocation and 1 copy up, no byte down; `.to()` makes 400 of each, and copies back."""
    count, found = bench_clip.trips(1)
    assert count > 151_000_000
    ours_up, ours_down = found["ours up"][0], found["ours down"][0]
    assert (ours_up.allocations, ours_up.copies_up, ours_up.copies_down) == (1, 1, 0)
    assert ours_up.bytes_up >= 4 * count
    assert (ours_down.allocations, ours_down.copies_up, ours_down.copies_down, ours_down.bytes_down) == (0, 0, 0, 0)
    assert (found["to up"][0].copies_up, found["to down"][0].copies_down) == (400, 400)


@needs_device
def test_torch_tells_the_cards_memory_only_where_the_context_is_paid(gpu: FakeGPU, make: Making) -> None:
    """Asking earlier would cost the context for life; a broken device tells nothing."""
    host = make(model=Stub())
    host.prepare()
    assert host.card_memory() is None
    assert gpu.figures().used == 0
    host.to_gpu()
    used_mib = gpu.figures().used / 2**20
    assert host.card_memory() == (64.0, pytest.approx(64.0 - used_mib), "process")
    gpu.break_down()
    host.to_cpu()
    assert host.card_memory() is None


class Runtime:
    """Stands for the part of the CUDA runtime that locks pages."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.calls: list[tuple[str, int, int]] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("lock", address, size))
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unlock", address, 0))
        return 0


def test_the_master_is_locked_in_place_to_the_byte_and_unlocked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy, no rounding up to a power of two."""
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    weights = _Weights(Stub())
    for _ in range(2):
        weights._pin(torch.device("cuda", 0))
    address = weights._master.data_ptr()
    assert runtime.calls == [("lock", address, weights.nbytes)]
    weights.unpin()
    weights.unpin()
    assert runtime.calls[1:] == [("unlock", address, 0)]


@pytest.mark.parametrize("why", ["refused", "too_much", "cpu", "no_runtime"])
def test_weights_that_cannot_be_locked_stay_pageable(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A slower copy, never a failure: `ulimit -l`, an eighth of the machine's memory, another kind of device."""
    runtime = Runtime(answer=2 if why == "refused" else 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: None if why == "no_runtime" else runtime)
    weights = _Weights(Stub())
    if why == "too_much":
        monkeypatch.setattr(clip_module, "_ram_bytes", lambda: 8 * weights.nbytes - 1)
    weights._pin(torch.device("cpu" if why == "cpu" else "cuda"))
    weights.unpin()
    assert [call[0] for call in runtime.calls] == (["lock"] if why == "refused" else [])


def test_long_work_tells_how_far_it_is(make: Making) -> None:
    """After every batch, in the caller's thread, with the batches bounded by `batch_size`."""
    told: list[tuple[int, int]] = []
    host = make()
    host.encode(["a", picture(), "b", "c"], batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 4), (3, 4), (4, 4)]


def test_a_download_tells_its_progress_in_the_log_and_leaves_the_terminal_alone(
    make: Making,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every tenth of the bytes is a record; counting files is not progress."""
    import huggingface_hub

    folder = tiny_clip.build(tmp_path / "fetched")

    def fetch(repository: str, *, ignore_patterns: list[str], tqdm_class: Any) -> str:
        assert "*.bin" in ignore_patterns
        for unit, total in (("it", 4), ("B", 600 * 2**20)):
            with tqdm_class(total=total, unit=unit, unit_scale=True, desc=repository) as bar:
                for _ in range(4 if unit == "it" else 20):
                    bar.update(1 if unit == "it" else total // 20)
        return str(folder)

    capfd.readouterr()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with caplog.at_level(logging.INFO, logger="gpu_fsm"):
        clip_module._find("some/model", pickles=False)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "looking for some/model in the local cache and at the Hugging Face hub"
    assert lines[1:] == [f"CLIP's weights: {10 * tenth} % of 600 MiB fetched" for tenth in range(1, 11)]
    assert capfd.readouterr() == ("", "")


def test_a_download_that_grows_while_it_goes_on_is_told_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """The hub counts all files in one bar, whose size grows with each file that begins."""
    bar = clip_module._logged_progress()(total=4 << 20, unit="B")
    caplog.set_level(logging.INFO, "gpu_fsm")
    bar.update(4 << 20)
    bar.total += 600 << 20
    for _ in range(6):
        bar.update(100 << 20)
    bar.close()
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "CLIP's weights: 100 % of 4 MiB fetched"
    assert said[-1] == "CLIP's weights: 100 % of 604 MiB fetched"
    assert len(said) == 7


@needs_device
def test_a_card_without_room_for_the_context_is_out_of_memory_not_broken(gpu: FakeGPU, make: Making) -> None:
    """A full card may be asked again; only other errors are for life."""
    gpu.reset(total_mib=4, context_mib=8)
    host = make()
    with pytest.raises(ClipOutOfMemory):
        host.to_gpu()
    assert host.gpu_usable
    gpu.reset(total_mib=64, context_mib=8)
    host.to_gpu()
    assert host.place == "gpu"


@needs_device
def test_out_of_memory_in_a_batch_keeps_the_model_where_it_is(gpu: FakeGPU, make: Making) -> None:
    """A batch that was too big is the caller's to shrink; the cache that it left is given back."""
    host = make()
    host.to_gpu()
    reference = host.encode(ITEMS)
    gpu.fail_allocation(5)
    with pytest.raises(ClipOutOfMemory, match="batch_size"):
        host.encode(ITEMS)
    assert host.place == "gpu"
    assert gpu.figures().allocated == gpu.figures().reserved
    assert np.array_equal(host.encode(ITEMS), reference)


@needs_device
@pytest.mark.parametrize("moment", ["moving_up", "encoding", "moving_down"])
def test_a_broken_device_is_left_for_life_and_clip_serves_on(gpu: FakeGPU, make: Making, moment: str) -> None:
    """Row C04: the master is bound without asking the device for anything; no later move is tried, by no host."""
    host, other = make(), make()
    reference = host.encode(ITEMS)
    other.prepare()
    if moment != "moving_up":
        host.to_gpu()
    gpu.break_down()
    if moment == "moving_up":
        with pytest.raises(CudaPoisoned, match="restart the program"):
            host.to_gpu()
    elif moment == "encoding":
        with pytest.raises(CudaPoisoned, match="device-side assert"):
            host.encode(ITEMS)
    else:
        host.to_cpu()
    assert (host.place, host.held_mib) == ("cpu", 0.0)
    assert np.array_equal(host.encode(ITEMS), reference)
    gpu.break_down(False)
    for each in (host, other):
        assert not each.gpu_usable
        assert "device-side assert" in each.gpu_unusable_reason
        with pytest.raises(CudaPoisoned):
            each.to_gpu()
    assert np.array_equal(host.encode(ITEMS), reference)


@needs_device
def test_a_bad_batch_on_a_sound_device_is_no_broken_device(gpu: FakeGPU, make: Making) -> None:
    """The device is asked for a small piece of work before it is given up."""
    model = Stub()
    host = make(model=model)
    host.to_gpu()

    def fail(stub: Stub) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.disturb = fail
    with pytest.raises(ClipError, match="shapes") as caught:
        host.encode(["x"])
    assert not isinstance(caught.value, CudaPoisoned)
    assert host.gpu_usable
    assert host.place == "gpu"
    model.disturb = lambda stub: None


@needs_device
def test_a_move_that_changes_embeddings_is_undone(gpu: FakeGPU, make: Making) -> None:
    """The canary is compared before anybody is told of the move."""
    model = Stub()
    host = make(model=model)
    reference = host.encode(["a"])

    def garble(stub: Stub) -> None:
        if stub.where == "fakegpu":
            with torch.no_grad():
                stub.kept[:4] = -1.0

    model.disturb = garble
    with pytest.raises(ClipError, match="cosine"):
        host.to_gpu()
    assert (host.place, gpu.figures().allocated, gpu.figures().reserved) == ("cpu", 0, 0)
    assert np.array_equal(host.encode(["a"]), reference)


@needs_device
def test_an_interrupt_in_a_move_leaves_the_model_whole(gpu: FakeGPU, make: Making) -> None:
    """Row D14: Ctrl-C goes through, and neither half a binding nor the copy stays behind."""
    model = Stub()
    host = make(model=model)
    reference = host.encode(["a"])

    def interrupt(stub: Stub) -> None:
        raise KeyboardInterrupt

    model.disturb = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        host.to_gpu()
    model.disturb = lambda stub: None
    assert caught.value is not None
    assert (host.place, gpu.figures().allocated, gpu.figures().reserved) == ("cpu", 0, 0)
    assert np.array_equal(host.encode(["a"]), reference)
    host.to_gpu()


@needs_device
def test_a_model_moved_behind_our_back_is_seen_and_brought_home(gpu: FakeGPU, make: Making) -> None:
    """Row C07: the place is read from the tensors, from every one of them, not remembered."""
    host = make()
    reference = host.encode(ITEMS)
    whole = host._model[0].model
    for moved in (host._model, whole.text_model, whole.vision_model):
        moved.to("fakegpu")
        assert (host.place, host.device) == ("gpu", "fakegpu:0" if moved is host._model else "mixed")
        host.to_cpu()
        assert host.device == "cpu"
        assert gpu.figures().allocated == 0
        assert np.array_equal(host.encode(ITEMS), reference)


# --- threads and life ------------------------------------------------------------------------------------------------


@needs_device
def test_migrations_beside_two_encoding_threads_give_no_wrong_vector(gpu: FakeGPU, make: Making) -> None:
    """Row C05: the lock keeps batches and moves apart, even where nobody holds a lease."""
    host = make()
    reference = host.encode(ITEMS)
    stop = threading.Event()
    wrong: list[object] = []
    rounds = [0, 0]

    def encode_on(which: int) -> None:
        while not stop.is_set():
            try:
                vectors = host.encode(ITEMS, batch_size=1)
            except GPUFSMError as error:
                wrong.append(error)
                return
            if not np.allclose(vectors, reference, atol=1e-4):
                wrong.append(vectors)
            rounds[which] += 1

    threads = [threading.Thread(target=encode_on, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            host.to_gpu()
            host.to_cpu()
    finally:
        stop.set()
        for thread in threads:
            thread.join(30.0)
    assert wrong == []
    assert min(rounds) > 0
    assert np.array_equal(host.encode(ITEMS), reference)


@needs_device
def test_a_move_waits_for_a_running_batch_and_not_for_ever(gpu: FakeGPU, make: Making) -> None:
    """The last line of defence: bounded, and then an error instead of a crash."""
    model, inside, go_on = Stub(), threading.Event(), threading.Event()
    host = make(model=model, drain_timeout_s=0.05)
    host.prepare()

    def linger(stub: Stub) -> None:
        inside.set()
        assert go_on.wait(10.0)

    model.disturb = linger
    thread = threading.Thread(target=host.encode, args=(["x"],))
    thread.start()
    assert inside.wait(10.0)
    with pytest.raises(ClipError, match="not moved"):
        host.to_gpu()
    assert (host.place, host.device) == ("cpu", "cpu")
    go_on.set()
    thread.join(10.0)
    host.to_gpu()
    assert host.place == "gpu"


@needs_device
@settings(max_examples=30)
@given(steps=st.lists(st.sampled_from(["up", "down", "encode", "oom"]), max_size=12))
def test_any_order_of_moves_keeps_the_promises(steps: list[str]) -> None:
    """One device for all tensors, the master's bytes never change, and on the CPU nothing is held."""
    gpu = fakegpu.load()
    gpu.reset(total_mib=64, context_mib=8)
    host = CLIPManager(GPUResourceConfig(clip_device="fakegpu:0"), model=Stub())
    reference = host.encode(["a"])
    digest = master_of(host)
    for step in steps:
        if step == "up":
            host.to_gpu()
        elif step == "down":
            host.to_cpu()
        elif step == "oom":
            host.to_cpu()
            gpu.fail_allocation(0)
            with pytest.raises(ClipOutOfMemory):
                host.to_gpu()
        assert np.allclose(host.encode(["a"]), reference, atol=1e-5)
        assert host.device == ("fakegpu:0" if host.place == "gpu" else "cpu")
        assert master_of(host) == digest
        assert host.place == "gpu" or gpu.figures().allocated == 0
    host.close()
    assert (gpu.figures().allocated, gpu.figures().reserved) == (0, 0)


def test_a_forked_process_is_told_to_make_its_own(make: Making) -> None:
    """Row C10: neither CUDA nor torch's threads survive a fork."""
    host = make()
    host.prepare()
    host._pid = os.getpid() + 1
    for call in (lambda: host.encode(["x"]), host.to_gpu, host.to_cpu, host.prepare):
        with pytest.raises(ForkedProcess, match="new manager"):
            call()
    host.close()
    host._pid = os.getpid()


@needs_device
def test_close_gives_the_card_back_once(gpu: FakeGPU, make: Making) -> None:
    """Idempotent; the model given in is left on the CPU and whole; later calls say that it is closed."""
    model = Stub()
    host = make(model=model)
    host.to_gpu()
    host.close()
    host.close()
    assert (gpu.figures().allocated, gpu.figures().reserved) == (0, 0)
    assert model.where == "cpu"
    assert model.encode([{"text": "x"}]).shape == (1, 8)
    assert (host.place, host.device, host.gpu_usable) == ("none", "none", False)
    with pytest.raises(ManagerClosed):
        host.encode(["x"])


# --- which device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "words"),
    [
        pytest.param("cpu", "settings", id="cpu_by_choice"),
        pytest.param("meta", "no GPU", id="meta"),
        pytest.param("fakegpu:7", "not available", id="index_too_high"),
        pytest.param("banana", "no such device", id="unknown_name"),
    ],
)
def test_a_device_that_cannot_be_used_says_why(make: Making, device: str, words: str) -> None:
    """`gpu_usable` never raises; a move does, and CLIP stays usable on the CPU."""
    if device.startswith("fakegpu"):
        if fakegpu.missing():
            pytest.skip(fakegpu.missing())
        fakegpu.load()
    host = make(clip_device=device)
    assert not host.gpu_usable
    assert words in host.gpu_unusable_reason
    if device == "banana":
        with pytest.raises(ConfigError, match="clip_device"):
            host.prepare()
        return
    with pytest.raises(ClipUnavailable, match=words):
        host.to_gpu()
    assert host.encode(["x"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [(("cuda", "mps"), "cuda:0"), (("mps", "xpu"), "mps:0"), (("xpu",), "xpu:0"), ((), None)],
    ids=["cuda_first", "then_mps", "then_xpu", "else_none"],
)
def test_auto_takes_the_first_gpu_that_torch_reports(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], chosen: str | None
) -> None:
    """Row C16: with an index, so that no thread's default device can redirect a move."""
    for kind in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(torch.get_device_module(kind), "is_available", lambda kind=kind: kind in there)
    device, reason = clip_module._choose_device("auto")
    assert (None if device is None else str(device)) == chosen
    assert bool(reason) == (chosen is None)
