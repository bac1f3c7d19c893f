"""Settings for the whole test session."""

import gc
import signal
from pathlib import Path

import jax
import pytest

_BACKEND = pytest.StashKey[tuple[str, jax.Device]]()

# Several devices, so that tests can shard over them. Everything else runs on the first one, as without this.
jax.config.update("jax_num_cpu_devices", 4)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=["cpu", "cuda", "rocm"],
        help="where test_backend.py decodes; by default on the GPU if JAX has one, else on the CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    from jax_monokernel.plan import default_platform

    platform = config.getoption("--backend") or default_platform()
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError as error:
        raise pytest.UsageError(f"--backend={platform}, but JAX has no such device here: {error}") from error
    config.stash[_BACKEND] = platform, device
    if default_platform() != "cpu":  # all other tests are of what needs no GPU
        jax.config.update("jax_default_device", jax.local_devices(backend="cpu")[0])
    # A shell that runs the tests in the background has them ignore Ctrl-C, which some send to themselves.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "sanitize: exercises the native part; .ci/sanitize runs these under sanitizers")


@pytest.fixture(autouse=True, scope="module")
def _room_for_compiled_programs():
    """Each program that XLA has compiled for the CPU takes three mappings of memory. A process may have 65,530 of them.

    There XLA crashes, and a process that runs all tests comes there.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="session")
def _time_for_simulated_gpus():
    """The topology probe's device code runs on more threads than there are CPUs, and they wait by spinning."""
    from jax_monokernel.topology import probe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "START_S", 30.0)
        yield


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> tuple[str, jax.Device]:
    """(platform, device) that test_backend.py tests."""
    return request.config.stash[_BACKEND]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """environment(name, value) sets a variable, or unsets it with None, for this test. The native part knows too."""
    from jax_monokernel import _native

    def change(name: str, value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
        _native.read_environment()

    yield change
    monkeypatch.undo()
    _native.read_environment()


@pytest.fixture(scope="module")
def quick_compiles():
    """For modules whose time goes into compiling tiny models: XLA leaves most optimizations out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compilations():
    """Names of what XLA compiles during a test."""
    seen: list[str] = []
    active = [True]

    def listen(event, _duration, **_):
        if active[0] and event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active[0] = False


@pytest.fixture(scope="session")
def fake_gpu_library(tmp_path_factory: pytest.TempPathFactory):
    """A stand-in for GPU drivers and compilers (gpu_fakes.py)."""
    from gpu_fakes import build_fake

    return build_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def make_fake(fake_gpu_library, tmp_path, environment):
    """make_fake(platform) is a fresh driver and compiler that all calls use from then on, as in a fresh process."""
    from gpu_fakes import VARIABLES, Fake

    environment("MONOKERNEL_CACHE_DIR", str(tmp_path / "cache"))
    made = []

    def make(platform="cuda"):
        folder = tmp_path / f"fake{len(made)}"
        folder.mkdir()
        fake = Fake(fake_gpu_library, folder, platform)
        for name in VARIABLES[platform]:
            environment(name, str(fake.path))
        made.append(fake)
        return fake

    return make


@pytest.fixture(scope="session")
def _rocm_libraries(tmp_path_factory: pytest.TempPathFactory):
    """(libraries, cache folder), made once: the run time opens a library only once in a process."""
    from rocm_stand_in import StandIn

    return StandIn(tmp_path_factory.mktemp("rocm")), tmp_path_factory.mktemp("cache")


@pytest.fixture
def rocm_stand_in(_rocm_libraries, environment, monkeypatch):
    """Stand-ins for HIP and hipRTC that run the kernel (rocm_stand_in.py), in use for what follows.

    At the end, none of the calls that were made may have been wrong.
    """
    from rocm_stand_in import compiler_command

    libraries, cache = _rocm_libraries
    environment("MONOKERNEL_CACHE_DIR", str(cache))
    for name, value in libraries.variables.items():
        environment(name, value)
    monkeypatch.setenv("HIPRTC_HOST_COMPILER", compiler_command())
    libraries.reset()
    yield libraries
    assert libraries.take_complaints() == ""
    assert libraries.hiprtc.hiprtc_programs() == 0
