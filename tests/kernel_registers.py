"""Prints the registers that the GPU kernel takes for published models, and what of them is spilled; no GPU is needed.

    python tests/kernel_registers.py amd                      # gfx942, 304 units, capacity 2,048, by PyPI's ziglang
    python tests/kernel_registers.py cuda --cuobjdump PATH    # sm_90, 132 units, by NVRTC, read by CUDA's cuobjdump

docs/performance-log.md and docs/amd.md have its numbers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import amd_code
from published import PUBLISHED

from jax_monokernel import DecoderSpec, _gpu
from jax_monokernel.models.registry import family_of
from jax_monokernel.plan import attention_tasks, make_plan

CUDA = {"Llama-3.2-1B": (1, 4, 8, 16), "Qwen3-0.6B": (1, 8), "SmolLM2-135M": (1,)}


def published_spec(name: str) -> DecoderSpec:
    return family_of(PUBLISHED[name]).spec_from_config(PUBLISHED[name], dtype="bfloat16")


def amd_line(name: str, batch: int) -> str:
    spec = published_spec(name)
    plan = make_plan(spec, platform="rocm", units=304)
    kernel = amd_code.Kernel(spec, plan, batch, *attention_tasks(spec, plan, batch, 2048))
    numbers = amd_code.metadata(kernel.assembly)
    keys = ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return ", ".join(f"{key} {numbers[key]}" for key in keys)


def cuda_line(name: str, batch: int, cuobjdump: str) -> str:
    target, capacity = _gpu.Target("cuda", "sm_90", 132), 160 if batch == 1 else 1024
    compiled = _gpu.compile_ahead(published_spec(name), target, batch=batch, capacity=capacity)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.code)
        usage, code = (
            subprocess.run([cuobjdump, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return f"registers {found[1]}, spilled loads {code.count('LDL')}, stores {code.count('STL')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vendor", choices=("amd", "cuda"))
    parser.add_argument("--cuobjdump", default="cuobjdump")
    options = parser.parse_args()
    kernels = CUDA if options.vendor == "cuda" else dict.fromkeys(PUBLISHED, (1, 16))
    for name, batches in kernels.items():
        for batch in batches:
            line = amd_line(name, batch) if options.vendor == "amd" else cuda_line(name, batch, options.cuobjdump)
            print(f"{name}, {batch} requests: {line}", flush=True)


if __name__ == "__main__":
    main()
