"""The GPU run time on a stand-in for drivers and compilers (native/fake_gpu.cc), called through XLA's CPU platform."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, LayerSpec, RopeSpec, _native
from jax_monokernel._program import program
from jax_monokernel.plan import Plan, Platform, geometry

PLATFORMS = ("cuda", "rocm")
LAUNCHES = (
    "runs",
    "times_out",
    "until_cancelled",
    "fails_to_launch",
    "crashes",
    "unknown_reason",
    "invalid_token",
    "invalid_position",
    "misses_activations",
    "misses_token",
    "misses_places",
    "misses_no_more",
)
VARIABLES = {
    "cuda": ("MONOKERNEL_CUDA_LIBRARY", "MONOKERNEL_NVRTC_LIBRARY"),
    "rocm": ("MONOKERNEL_HIP_LIBRARY", "MONOKERNEL_HIPRTC_LIBRARY"),
}
ARCHES = {"cuda": "sm_90", "rocm": "gfx942"}
WARP = {"cuda": 32, "rocm": 64}


def build_fake(folder: Path) -> Path:
    """Compiles the stand-in."""
    root = Path(__file__).parent
    library = folder / "libfake.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall"]
    folders = [f"-I{root.parent / 'ffi'}", f"-I{root / 'native'}"]
    source = root / "native" / "fake_gpu.cc"
    subprocess.run(["c++", *flags, *folders, "-o", library, source, "-lpthread"], check=True)
    return library


class Fake:
    """One copy of the stand-in, with variables of its own: fake.units = 7, fake.compiles."""

    def __init__(self, library: Path, folder: Path, platform: Platform) -> None:
        path = folder / "libfake.so"
        shutil.copy(library, path)  # another file is another library to the loader
        self.__dict__.update({"platform": platform, "path": path, "library": ctypes.CDLL(str(path))})
        self.launch = "runs"
        if platform == "rocm":
            self.shared_bytes = 64 * 1024

    def __getattr__(self, name: str) -> Any:
        if name in ("source", "flags", "headers"):
            return ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self.library, "fake_" + name))).decode()
        return ctypes.c_int.in_dll(self.library, "fake_" + name).value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "arch":
            ctypes.memmove(
                ctypes.addressof(ctypes.c_char.in_dll(self.library, "fake_arch")),
                value.encode() + b"\0",
                len(value) + 1,
            )
            return
        ctypes.c_int.in_dll(self.library, "fake_" + name).value = LAUNCHES.index(value) if name == "launch" else value


def spec_of(**changes: Any) -> DecoderSpec:
    """A small model."""
    rope = RopeSpec(theta=1e4, rotary_dim=8)
    spec = DecoderSpec(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layers=(LayerSpec(rope=0), LayerSpec(window=5)),
        ropes=(rope,),
        dtype="bfloat16",
    )
    return spec.replace(**changes)


@functools.cache
def register() -> None:
    for platform, targets in _native.gpu_test_registrations().items():
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(f"{name}_on_fake_{platform.lower()}", handler, platform="cpu")


@dataclasses.dataclass
class Call:
    """Operands, results and attributes of one custom call, to be changed by tests before it is run."""

    platform: Platform
    operands: dict[str, np.ndarray]
    results: dict[str, jax.ShapeDtypeStruct]
    attributes: dict[str, Any]
    aliased: bool = True

    def run(self, device: int = 0) -> dict[str, np.ndarray]:
        """The results by name, or what the call raised."""
        register()
        names, fresh = list(self.operands), 3
        first = names.index("k_cache")
        aliases = {first + i: fresh + i for i in range(6)} if self.aliased else {}
        call = jax.ffi.ffi_call(
            f"jax_monokernel_decode_on_fake_{self.platform}", list(self.results.values()), input_output_aliases=aliases
        )
        run = jax.jit(lambda *operands: call(*operands, **self.attributes))
        operands = jax.device_put(list(self.operands.values()), jax.devices()[device])
        return dict(zip(self.results, map(np.asarray, run(*operands)), strict=True))


def make_call(
    platform: Platform = "cuda",
    *,
    spec: DecoderSpec | None = None,
    units: int = 5,
    batch: int = 2,
    steps: int = 4,
    capacity: int = 16,
    log_probs: bool = False,
    plan: Plan | None = None,
) -> Call:
    """A call with random contents."""
    spec = spec or spec_of()
    plan = plan or Plan(platform=platform, units=units)
    geo = geometry(spec, plan)
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(spec.dtype)
    kv = (batch, len(spec.layers), spec.num_kv_heads, capacity, spec.head_dim)

    def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    operands = {
        "streams": floats(*geo.stream_shape, dtype=dtype),
        "constants": floats(geo.constants),
        "embedding": floats(*((0, 0) if spec.tied_head else (spec.vocab_size, spec.hidden_size)), dtype=dtype),
        "temperature": floats(batch),
        "top_k": np.ones(batch, np.int32),
        "top_p": floats(batch),
        "min_p": floats(batch),
        "repetition_penalty": floats(batch),
        "presence_penalty": floats(batch),
        "max_new_tokens": np.full(batch, steps, np.int32),
        "eos_token_id": np.full((batch, 1), -1, np.int32),
        "logit_bias": floats(batch, 0),
        "key_data": rng.integers(0, 2**32, (batch, 2), np.uint32),
        "k_cache": floats(*kv, dtype=dtype),
        "v_cache": floats(*kv, dtype=dtype),
        "position": rng.integers(1, 5, batch, np.int32),
        "last_token": rng.integers(0, 40, batch, np.int32),
        "status": np.zeros(batch, np.int32),
        "seen": rng.integers(0, 3, (batch, spec.vocab_size), np.uint8),
    }
    attributes = program(spec, plan) | {"splits": np.int64(1), "task_heads": np.int64(1)}
    size = _native.gpu_workspace_bytes(**program(spec, plan), batch=batch, splits=1, task_heads=1)
    results = {
        "tokens": jax.ShapeDtypeStruct((batch, steps), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "log_probs": jax.ShapeDtypeStruct((batch, steps if log_probs else 0), jnp.float32),
    }
    for name in ("k_cache", "v_cache", "position", "last_token", "status", "seen"):
        results[name] = jax.ShapeDtypeStruct(operands[name].shape, operands[name].dtype)
    results["workspace"] = jax.ShapeDtypeStruct((size,), jnp.uint8)
    return Call(platform, operands, results, attributes)
