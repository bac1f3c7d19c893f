import ctypes
import dataclasses
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gpu_build import nvrtc_version

# Last, so that an installed jax_monokernel is not hidden by its sources.
_REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(_REPOSITORY))

from benchmarks import gpu_kernel, report, run  # noqa: E402
from benchmarks.bandwidth import Bandwidth  # noqa: E402
from benchmarks.gguf_model import write_gguf  # noqa: E402
from jax_monokernel._bench.jax_loop import JaxLoop  # noqa: E402
from jax_monokernel._bench.ours import Ours  # noqa: E402
from jax_monokernel._bench.runner import make_prompt  # noqa: E402
from jax_monokernel._bench.shapes import SHAPES, kv_bytes, random_weights, weight_bytes  # noqa: E402
from jax_monokernel._bench.summary import summarize  # noqa: E402

FAMILIES = {
    "llama": {},
    "llama-untied": {"tied_head": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
# Nearly all of the time here is XLA's compiler and Python's imports.
pytestmark = pytest.mark.usefixtures("quick_compiles")
each_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(family: str, dtype: str = "float32"):
    """A spec and weights large enough that the tokens vary."""
    spec = dataclasses.replace(SHAPES["tiny"], **FAMILIES[family]).spec(dtype)
    weights = random_weights(spec, seed=3)

    def enlarged(path, leaf):
        return leaf if "norm" in jax.tree_util.keystr(path) else (leaf * 6).astype(leaf.dtype)

    return spec, dataclasses.replace(weights, layers=jax.tree_util.tree_map_with_path(enlarged, weights.layers))


@each_family
def test_jax_loop_gives_our_tokens(family):
    spec, weights = tiny(family)
    prompt = make_prompt(2, 20, spec.vocab_size)
    ours, loop = Ours(spec, weights, prompt, 24), JaxLoop(spec, weights, prompt, 24)
    tokens = ours.measure()["tokens"]
    assert len(np.unique(tokens)) > 12, "tokens that hardly vary would prove nothing"
    for _ in range(2):  # a second measurement starts where the first did
        assert ours.measure()["tokens"] == loop.measure()["tokens"] == tokens


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_gives_our_tokens(family, dtype, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: pip install jax-monokernel[bench]")
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install jax-monokernel[bench]")
    from benchmarks.llamacpp import LlamaCpp

    spec, weights = tiny(family, dtype)
    prompt = make_prompt(2, 20, spec.vocab_size)
    path = tmp_path / "model.gguf"
    write_gguf(path, spec, weights)
    # llama.cpp's flash attention is in f16 where the cache is f32; with a bf16 cache it rounds where we do.
    peer = LlamaCpp(path, prompt, 24, 1, kv_dtype=dtype, flash_attention=int(dtype == "bfloat16"))
    ours = Ours(spec, weights, prompt, 24).measure()["tokens"]
    for _ in range(2):
        assert peer.measure()["tokens"] == ours


@each_family
@pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning")  # PyTorch's own, of parts of it
def test_transformers_gives_our_tokens(family, tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch transformers")
    pytest.importorskip("transformers", reason="needs transformers: pip install torch transformers")
    from benchmarks.checkpoint_model import write_checkpoint
    from benchmarks.transformers_peer import Transformers

    spec, weights = tiny(family)
    prompt = make_prompt(2, 20, spec.vocab_size)
    write_checkpoint(tmp_path / "model", spec, weights)
    ours = Ours(spec, weights, prompt, 24).measure()["tokens"]
    # Compiling takes half a minute; that the compiled step gives these tokens, too, is for `python -m benchmarks run`.
    peer = Transformers(tmp_path / "model", prompt, 24, 1, "float32", compiled=0)
    for _ in range(2):
        assert peer.measure()["tokens"] == ours


def test_gguf_holds_bf16_matrices_bit_for_bit(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install jax-monokernel[bench]")
    spec, weights = tiny("qwen2", "bfloat16")
    write_gguf(tmp_path / "model.gguf", spec, weights)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, want in (("token_embd.weight", weights.embedding), ("blk.1.ffn_down.weight", weights.layers.down[1])):
        assert tensors[name].tensor_type.name == "BF16"
        assert tensors[name].data.tobytes() == np.asarray(want).tobytes()
    assert tensors["blk.0.attn_k.bias"].tensor_type.name == "F32"
    np.testing.assert_array_equal(tensors["blk.0.attn_k.bias"].data, np.asarray(weights.layers.k_bias[0], np.float32))


def test_random_weights_are_normal_and_repeatable():
    spec = SHAPES["10m"].spec()
    weights = random_weights(spec)
    gate = np.asarray(weights.layers.gate, np.float32)
    assert gate.std() == pytest.approx(0.02, rel=0.01)
    assert np.abs(gate.mean()) < 1e-4
    assert np.abs(gate).max() == pytest.approx(0.02 * 4.3, rel=0.05)  # of 2^16 equally likely values
    assert not np.array_equal(gate, np.asarray(weights.layers.up, np.float32))
    assert np.asarray(weights.final_norm, np.float32).mean() == pytest.approx(1, abs=0.05)
    for again, leaf in zip(jax.tree.leaves(random_weights(spec)), jax.tree.leaves(weights), strict=True):
        assert jnp.array_equal(again, leaf)


@pytest.mark.parametrize(
    ("shape", "million"),
    [("10m", 10.0), ("smollm2-135m", 134.5), ("qwen2.5-0.5b", 494.0), ("qwen3-0.6b", 596.0), ("llama3.2-1b", 1235.8)],
)
def test_tied_shapes_have_the_published_parameters(shape, million):
    assert weight_bytes(SHAPES[shape].spec()) / 2e6 == pytest.approx(million, abs=0.1)


def test_bytes_of_a_step():
    spec = SHAPES["llama3.1-8b"].spec()
    embedding = spec.vocab_size * spec.hidden_size
    # 8.03 billion parameters, of which the untied embedding is read one row only.
    assert weight_bytes(spec) == pytest.approx(2 * (8.0303e9 - embedding), rel=1e-4)
    assert kv_bytes(spec, 100) == 100 * 2 * 32 * 8 * 128 * 2


def test_bandwidth_probe_reads_what_it_says():
    probe = Bandwidth(3_000_001, threads=2, bytes_per_measurement=1e8)
    found = probe.measure()
    assert 0.99 * 3e6 < found["bytes"] <= 3e6
    assert 0 < found["best"] <= found["seconds"]
    assert found["bytes"] / found["best"] < 10e12, "the reads were optimised away"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with the result of one short run."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--shapes", "tiny", "--prompt", "8", "--new-tokens", "8", "--repeats", "1", "--threads", "1"]
    peers = ["ours", "jax_loop", "probe"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as quick_compiles, for the peers' processes
        run.main([*arguments, "--dtype", "float32", "--output", str(folder), "--peers", *peers])
    return folder


def test_runner_measures_every_peer(results):
    (path,) = results.glob("*.json")
    assert path.name == "tiny-p8-b1-t1.json"
    assert str(_REPOSITORY) not in path.read_text()
    result = json.loads(path.read_text())
    assert {
        "schema",
        "date",
        "command",
        "commit",
        "dirty",
        "machine",
        "versions",
        "busy",
        "energy",
        "workload",
        "peers",
    } <= set(result)
    assert result["peers"]["ours"]["tokens_sha256"] == result["peers"]["jax_loop"]["tokens_sha256"]
    assert result["peers"]["ours"]["ms_of_single_steps"]["p99"] > 0
    assert all(len(peer["seconds"]) == 1 and peer["gb_per_second"] > 0 for peer in result["peers"].values())


def test_report_is_deterministic(results, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install jax-monokernel[bench]")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    written = []
    for _ in range(2):
        report.main(["--results", str(results), "--readme", str(readme)])
        pictures = [(tmp_path / picture).read_bytes() for picture in (report.PICTURE, report.SWEEP)]
        written.append((readme.read_text(), pictures))
    assert written[0] == written[1]
    assert "old" not in written[0][0]
    assert written[0][0].startswith(f"before\n{report.START}\n| Shape")
    assert written[0][0].endswith(f"{report.END}\nafter\n")


def test_gpu_runner_gives_what_the_report_shows(tmp_path, capsys):
    from benchmarks import gpu

    sizes = ["--shapes", "tiny", "--batch", "1,2", "--prompt", "4", "--new-tokens", "6", "--repeats", "2"]
    gpu.main([*sizes, "--dry-run", "--output", str(tmp_path)])  # here JAX's device is a CPU
    out = capsys.readouterr().out
    assert len(re.findall(r"tiny-p4-b[12]  (?:ours|jax_loop) .* tok/s .* of the read roof", out)) == 4
    results = report.load_results(tmp_path)
    assert [r["workload"]["batch"] for r in results] == [1, 2]
    assert all(r["peers"]["ours"]["tokens_sha256"] for r in results)
    assert str(tmp_path) not in json.dumps(results)
    table = report.gpu_section(results)
    speeds = [results[1]["peers"][name]["tokens_per_second"] for name in ("ours", "jax_loop")]
    assert "| tiny (made up) | 1 | 4 |" in table
    assert f"{speeds[0] / speeds[1]:.2f}x" in table
    assert f"commit {results[0]['commit'][:12]}" in table
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install jax-monokernel[bench]")
    report.draw(results, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_gpu_runner_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu

    def measure(shape, *_):
        if shape == "10m":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"peers": {}, "workload": {}}

    monkeypatch.setattr(gpu, "measure", measure)
    with pytest.raises(SystemExit, match="failed: 10m-p32-b1"):
        gpu.main(["--shapes", "10m,tiny", "--dry-run", "--output", str(tmp_path)])
    assert "10m-p32-b1  failed: RESOURCE_EXHAUSTED" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-p32-b1.json"]


class FakeDriver:
    """In place of CUDA's: the probe's kernel says at once that it has read everything."""

    def __init__(self, binary, name, shared_bytes):
        assert (binary, name) == (b"binary", "read_bandwidth")
        self.short = 0

    def timed_launch(self, units, threads, args):
        assert threads == 32
        copies = args.passes * args.bytes // (16 << 10) // units - self.short
        ctypes.memmove(args.sums, np.full(units, copies, np.uint32).ctypes.data, 4 * units)
        return 0.5e-3


def test_gpu_probe_on_a_stand_in_for_the_driver(monkeypatch, capsys):
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "_PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(gpu, "compile_kernel", lambda source: b"binary" if "read_bandwidth" in source else b"")
    monkeypatch.setattr(gpu, "Driver", FakeDriver)
    probe = gpu.Probe(3)
    assert probe.measure() == {"seconds": pytest.approx(0.5e-3), "bytes": 4 * 21 * 3 * (16 << 10)}
    probe._driver.short = 1
    with pytest.raises(RuntimeError, match="has not read all"):
        probe.measure()
    # Where the kernel cannot be had, another probe takes its place, and that is said.
    monkeypatch.setattr(gpu, "default_platform", lambda: "cuda")
    monkeypatch.setattr(gpu, "Probe", lambda units: (_ for _ in ()).throw(OSError("no libnvrtc.so")))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(core_count=3)])
    assert gpu._probe(1 << 20).measure()["bytes"] == 1 << 20
    assert "XLA's sum is the probe: no libnvrtc.so" in capsys.readouterr().err


@pytest.mark.skipif(nvrtc_version() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
def test_nvrtc_compiles_the_probe():
    source = (_REPOSITORY / "benchmarks" / "read_bandwidth.cu").read_text()
    assert gpu_kernel.compile_kernel(source).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match="error"):
        gpu_kernel.compile_kernel("this is no CUDA")


@pytest.mark.parametrize("command", ["run", "gpu", "report", "timeline"])
def test_one_runner(command):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", command, "--help"],
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "usage: python -m benchmarks" in done.stdout


def test_summary_compares_within_rounds():
    workload = {"batch": 2, "new_tokens": 10, "bytes_per_step": 100}
    # The machine is twice as slow in the second of three rounds.
    peers = {
        "ours": {"seconds": [1.0, 2.0, 1.0]},
        "llama_cpp": {"seconds": [1.5, 3.0, 1.5], "steps": [[0.1] * 10] * 3},
        "probe": {"seconds": [0.5, 1.0, 0.5], "best": [0.5, 1.0, 0.5], "bytes": 1000},
    }
    found = summarize({"workload": workload, "peers": peers})["peers"]
    assert found["ours"]["tokens_per_second"] == 20
    assert found["ours"]["ms_per_step"] == {"median": 100, "p10": 100, "p90": 180, "min": 100}
    assert found["ours"]["share_of_probe"] == 0.5
    assert found["llama_cpp"]["ours_is_faster_by"] == 1.5
    assert found["llama_cpp"]["ms_of_single_steps"]["p90"] == 100
    assert "ours_is_faster_by" not in found["probe"] | found["ours"]


def test_readme_shows_the_committed_results():
    results = report.load_results()
    if not results:
        pytest.skip("no results are committed")
    readme = (_REPOSITORY / "README.md").read_text()
    assert report.with_section(readme, report.section(results)) == readme, "run python -m benchmarks.report"
    on_gpu = report.gpu_section(report.load_results(_REPOSITORY / "benchmarks" / "results" / "gpu"))
    shown = report.with_section(readme, on_gpu, report.GPU_START, report.GPU_END)
    assert shown == readme, "run python -m benchmarks.report"


def test_readme_without_markers_is_an_error():
    with pytest.raises(ValueError, match="benchmarks:start"):
        report.with_section("no markers", "text")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("ours", ("ours", {}, {})),
        ("llama_cpp:mmap=1,kv_dtype=bfloat16", ("llama_cpp", {"mmap": 1, "kv_dtype": "bfloat16"}, {})),
        ("llama_cpp:GLIBC_TUNABLES=a.b=1", ("llama_cpp", {}, {"GLIBC_TUNABLES": "a.b=1"})),
    ],
)
def test_peer_settings(text, want):
    assert run.parse_peer(text) == want


@pytest.mark.parametrize(
    "arguments", [["--peers", "thors"], ["--peers", "ours:x"], ["--shapes", "gpt"], ["--prompt", "1"]]
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        run.main(arguments)
    assert e.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.skipif(nvrtc_version() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("batch", [1, 16])
def test_nvrtc_keeps_a_fence_before_slots_are_given_back(batch):
    """Without it copies are not ordered behind what a wave reads of a slot: weights that came later were seen."""
    variant, spec = gpu_kernel.Variant(), SHAPES["qwen3-0.6b"].spec()
    stub = variant.stub(spec, variant.make_plan(spec, 132), batch, 160)
    ptx = gpu_kernel.compile_kernel(stub, as_text=True).decode()
    of_cache = (
        r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes \["  # those of weights have a hint
    )
    events = re.findall(
        rf"ld\.shared\.v4\.u32|fence\.proxy\.async\.shared::cta|mbarrier\.arrive\.shared::cta|{of_cache}", ptx
    )
    overwrites = ("mbarrier", "cp")
    given_back = [events[:i] for i, event in enumerate(events) if event.startswith(overwrites)]
    assert given_back
    for before in given_back:
        last = [event for event in before if not event.startswith(overwrites)][-1]
        assert last.startswith("fence")
    assert any(event.startswith("cp") for event in events) == (batch == 1)
    assert ("fence.proxy.async.global" in ptx) == (batch == 1)  # after keys and values are appended


@pytest.mark.skipif(nvrtc_version() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("racecheck", [False, True])
def test_nvrtc_kernels_for_racecheck_meet_as_it_can_follow(racecheck):
    """Waves that only arrive, or also meet without the others, are a race to it (tests/native/racecheck.cu)."""
    spec = SHAPES["qwen3-0.6b"].spec()
    variant = gpu_kernel.Variant(defines=(("MK_RACECHECK", "1"),) if racecheck else ())
    plan = variant.make_plan(spec, 132)
    ptx = gpu_kernel.compile_kernel(variant.stub(spec, plan, 2, 160), as_text=True).decode()
    lanes = 32 * (plan.waves + plan.service_waves)
    of_some = [count for count in re.findall(r"barrier\.sync \d+, (\d+);", ptx) if int(count) != lanes]
    only_arrives = re.search(r"\bbarrier\.arrive", ptx) is not None
    assert bool(of_some) == only_arrives == (not racecheck)
    assert ("mbarrier.test_wait.shared::cta.b64" in ptx) == racecheck  # the others are told by a parity
