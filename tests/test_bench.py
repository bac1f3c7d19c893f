"""`jax-monokernel bench`: what is measured, energy, pictures, and what is refused."""

import ctypes
import json
import re
import subprocess

import jax
import numpy as np
import pytest
from naive import random_weights
from typer.testing import CliRunner

from jax_monokernel import LayerSpec
from jax_monokernel._bench import energy, machine
from jax_monokernel._bench.jax_loop import not_covered
from jax_monokernel._bench.runner import Workload, bytes_per_step, measure
from jax_monokernel._bench.shapes import SHAPES, kv_bytes
from jax_monokernel._bench.summary import summarize
from jax_monokernel.cli import app

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The result of a short run, and its folder."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--shape", "tiny", "--batch", "1", "--batch", "2", "--prompt", "4", "--new-tokens", "6", "--rounds", "2"]
    files = ["--json", str(folder / "results.json"), "--plot", str(folder / "picture.svg")]
    done = run(*options, "--dtype", "float32", "--threads", "1", *files)
    assert done.exit_code == 0, done.output
    return done.output, json.loads((folder / "results.json").read_text()), folder


def test_results_say_what_was_measured(measured):
    output, found, _ = measured
    assert found["schema"] == 1
    assert [r["workload"]["batch"] for r in found["results"]] == [1, 2]
    for result in found["results"]:
        assert {"date", "commit", "dirty", "device", "machine", "versions", "energy", "command", "busy"} <= set(result)
        ours, loop, probe = (result["peers"][name] for name in ("ours", "jax_loop", "probe"))
        assert ours["tokens_sha256"] == loop["tokens_sha256"], "f32: the same tokens"
        assert loop["tokens_as_ours_until"] == [6] * result["workload"]["batch"]
        assert ours["ms_per_step"]["min"] <= ours["ms_per_step"]["median"] <= ours["ms_per_step"]["p90"]
        assert len(ours["seconds"]) == len(loop["seconds"]) == 2
        single = ours["ms_of_single_steps"]
        assert 0 < single["min"] <= single["median"] <= single["p90"] <= single["p99"]
        assert "steps" not in ours
        assert probe["gb_per_second"] > 0.01
        assert ours["share_of_probe"] > 0
        assert result["energy"].startswith(("not reported: ", "RAPL"))
    assert "tok/s" in output
    assert "of the read roof" in output


def test_what_does_not_fit_into_memory_is_not_begun(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 10**6)
    done = run("--shape", "10m")
    assert done.exit_code == 2
    assert re.search(r"error: 10m takes about 0 GB .* free here; choose a smaller shape", done.output)


def test_a_result_can_be_repeated(measured):
    command = measured[1]["results"][1]["command"].split()
    assert command[:2] == ["jax-monokernel", "bench"]
    done = run(*command[2:])
    assert done.exit_code == 0, done.output
    assert "tiny, batch 2, prompt 4, 6 new tokens, 2 rounds" in done.output


def test_the_picture_names_device_and_commit(measured):
    _, found, folder = measured
    about = found["results"][0]
    text = (folder / "picture.svg").read_text()
    assert "<svg" in text
    assert about["device"]["name"] in text
    assert (about["commit"] or "version")[:20] in text


def test_models_that_the_loop_cannot_decode_are_measured_without_it(tmp_path):
    from jax_monokernel import models

    config = {
        "model_type": "gemma2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "torch_dtype": "float32",
        "sliding_window": 8,
    }
    from jax_monokernel.models.registry import family_of

    spec = family_of(config).spec_from_config(config, dtype="float32")
    folder = tmp_path / "gemma"
    models.save_pretrained(models.Decoder.from_weights(spec, random_weights(spec, 1)), folder, config=config)
    done = run(
        "--model", str(folder), "--new-tokens", "3", "--rounds", "1", "--prompt", "2", "--peers", "ours,jax_loop"
    )
    assert done.exit_code == 0, done.output
    assert "jax_loop is left out, as it knows no norms after them" in done.output
    assert "jax_loop  " not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt"], "there is no shape 'gpt'; expected one of"),
        (["--peers", "ours,thors"], "there is no peer 'thors'"),
        (["--peers", "jax_loop"], "must have ours"),
        (["--model", "no/such/folder/here"], "check the path"),
        (["--json", "no/such/folder.json"], "a folder that is not there"),
        (["--plot", "picture.gif"], "another format than .svg or .png"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "rounds" not in done.output


def test_the_loop_says_what_it_does_not_cover():
    for shape in SHAPES.values():
        assert not_covered(shape.spec()) is None
    plain = SHAPES["tiny"].spec()
    changes = (
        {"post_norm": True},
        {"mlp_bias": True},
        {"activation": "gelu"},
        {"attn_softcap": 20.0},
        {"embedding_multiplier": 2.0},
        {"kv_dtype": "float32"},
        {"layers": (LayerSpec(window=4), LayerSpec())},
        {"layers": (LayerSpec(rope=None),) * 2, "ropes": ()},
    )
    for change in changes:
        assert not_covered(plain.replace(**change)), change


def test_bytes_of_windows():
    spec = SHAPES["tiny"].spec().replace(layers=(LayerSpec(window=8), LayerSpec()))
    assert kv_bytes(spec, 100) == 2 * (8 + 100) * spec.kv_size * 2
    assert bytes_per_step(spec, 2, 100, 1) - bytes_per_step(spec, 1, 100, 1) == kv_bytes(spec, 100)


class Clock:
    """A peer that takes as long as it is told."""

    def __init__(self, seconds, tokens=None):
        self.settings = {}
        self.seconds, self.tokens, self.calls = seconds, tokens, 0

    def measure(self):
        self.calls += 1
        return {"seconds": self.seconds, "tokens": [[self.calls, 2]] if self.tokens is None else self.tokens}


def test_energy_is_per_token():
    spec = SHAPES["tiny"].spec()
    counter = iter(np.cumsum(np.full(20, 3.0)))
    meter = energy.Meter("test", lambda: float(next(counter)))
    workload = Workload(model="tiny", batch=1, prompt_tokens=4, new_tokens=2)
    peers = {"ours": Clock(0.5, [[7, 9]])}
    found = summarize(measure(spec, workload, peers, rounds=3, meter=meter, energy_seconds=0))
    assert found["peers"]["ours"]["energy"]["joules"] == 3
    assert found["peers"]["ours"]["energy"]["calls"] == 1
    assert found["peers"]["ours"]["joules_per_token"] == 1.5
    still = energy.Meter("test", lambda: 7.0)  # a counter that has not moved says nothing
    found = summarize(measure(spec, workload, peers, rounds=1, meter=still, energy_seconds=0))
    assert "joules_per_token" not in found["peers"]["ours"]


def test_a_peer_whose_tokens_change_is_an_error():
    workload = Workload(model="tiny", batch=1, prompt_tokens=4, new_tokens=2)
    with pytest.raises(RuntimeError, match="ours gave other tokens in round 1 than before"):
        measure(SHAPES["tiny"].spec(), workload, {"ours": Clock(0.5)}, rounds=3)


# ---- Counters ----


def write_rapl(root, name, energy_uj, limit=10_000_000):
    (root / name).mkdir(exist_ok=True)
    (root / name / "energy_uj").write_text(str(energy_uj))
    (root / name / "max_energy_range_uj").write_text(str(limit))


def test_rapl_adds_packages_and_begins_again(tmp_path):
    write_rapl(tmp_path, "intel-rapl:0", 9_000_000)
    write_rapl(tmp_path, "intel-rapl:1", 1_000_000)
    write_rapl(tmp_path, "intel-rapl:0:0", 5_000_000)  # a part of package 0
    meter = energy.rapl(tmp_path)
    assert meter.source.startswith("RAPL, 2 packages")
    write_rapl(tmp_path, "intel-rapl:0", 500_000)  # past its range
    write_rapl(tmp_path, "intel-rapl:1", 4_000_000)
    assert meter.joules() == pytest.approx(1.500001 + 3)
    assert meter.joules() == pytest.approx(1.500001 + 3)


def test_without_counters_that_is_said(tmp_path):
    with pytest.raises(energy.NotReported, match="no RAPL counters"):
        energy.rapl(tmp_path)
    write_rapl(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()
    with pytest.raises(energy.NotReported, match="may not be read"):
        energy.rapl(tmp_path)


class Nvml:
    """NVML with one board."""

    millijoules = 5_000

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus, handle):
        return 0 if bus == b"0000:41:00.0" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        value._obj.value = self.millijoules
        return 0


def test_nvml():
    library = Nvml()
    meter = energy.nvml(library, "0000:41:00.0")
    before = meter.joules()
    library.millijoules += 1_500
    assert meter.joules() - before == 1.5
    with pytest.raises(energy.NotReported, match=r"find the device \(error 6\)"):
        energy.nvml(library, "0000:42:00.0")


class RocmSmi:
    """ROCm SMI with two devices."""

    ids = (0x41 << 8, 1 << 32 | 0xC1 << 8 | 2 << 28)
    ticks = 1000

    def rsmi_init(self, flags):
        return 0

    def rsmi_num_monitor_devices(self, count):
        count._obj.value = len(self.ids)
        return 0

    def rsmi_dev_pci_id_get(self, index, found):
        found._obj.value = self.ids[index]
        return 0

    def rsmi_dev_energy_count_get(self, index, ticks, microjoules, time):
        assert index == 1
        ticks._obj.value, microjoules._obj.value = self.ticks, 15.25
        assert isinstance(time._obj, ctypes.c_uint64)
        return 0


def test_rocm_smi():
    library = RocmSmi()
    meter = energy.rocm_smi(library, "0001:C1:00.0")
    before = meter.joules()
    library.ticks += 1_000_000
    assert meter.joules() - before == pytest.approx(15.25)
    with pytest.raises(energy.NotReported, match="does not know the device"):
        energy.rocm_smi(library, "0000:99:00.0")


def test_rocm_smi_is_called_as_its_functions_are(tmp_path):
    """A library whose arguments are those of AMD's header (test_hip_headers.py): a wrong one would not be converted."""
    source = """
        #include <stdint.h>
        int rsmi_init(uint64_t flags) { return flags != 0; }
        int rsmi_num_monitor_devices(uint32_t *count) { *count = 2; return 0; }
        int rsmi_dev_pci_id_get(uint32_t device, uint64_t *id) {
          *id = (uint64_t)device << 32 | 0xc1 << 8 | 3u << 28;
          return 0;
        }
        int rsmi_dev_energy_count_get(uint32_t device, uint64_t *ticks, float *microjoules, uint64_t *time) {
          *ticks += 1ull << 40, *microjoules = device * 15.25f, *time = 7;
          return 0;
        }
    """
    path = tmp_path / "librocm_smi64.so.7"
    subprocess.run(["c++", "-x", "c", "-shared", "-fPIC", "-o", path, "-"], input=source.encode(), check=True)
    meter = energy.rocm_smi(energy.open_rocm_smi([str(tmp_path)]), "0001:c1:00.0")
    assert meter.joules() == pytest.approx(2 * 2**40 * 15.25 / 1e6)


def test_this_machine_has_a_meter_or_a_reason():
    try:
        meter = energy.find_meter(jax.devices("cpu")[0])
    except energy.NotReported as error:
        said = str(error)
    else:
        said = meter.source
        assert meter.joules() <= meter.joules()
    assert "RAPL" in said
