"""An exported program gives the model's numbers where nothing of this package is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gam_flax
from gam_flax import cli
from gam_flax.convert import CheckpointError, save
from gam_flax.ops.convolution import choose
from gam_flax.ops.convolution.prepared import PreparedConv, _kernel
from tests.paths import ROOT

pytestmark = pytest.mark.usefixtures("unchecked")  # a symbolic size is no int

SERVE = """
import sys
from pathlib import Path
import numpy as np
from jax import export
program = export.deserialize(bytearray(Path(sys.argv[1]).read_bytes()))
x = np.load(sys.argv[2])
np.save(sys.argv[3], program.call(x))
strangers = {"gam_flax", "gam_torch", "flax", "torch"} & set(sys.modules)
assert not strangers, strangers
print(*program.platforms)
"""


def served(program, x, folder):
    """What a process with jax alone makes of `x`, and the program's platforms."""
    np.save(folder / "x.npy", x)
    paths = [program, folder / "x.npy", folder / "y.npy"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-I", "-c", SERVE, *map(str, paths)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "y.npy"), done.stdout.split()


def network(name="resnet8", attention="gam", **options):
    model = gam_flax.create_model(
        name, attention=attention, num_classes=5, rngs=nnx.Rngs(0), **options
    )
    gam_flax.torch_default_init(model, jax.random.key(0))
    return model


SMALL = {"layers": (1, 1), "widths": (8, 16), "attention_options": {"ratio": 4}}
GROUPED = {"variant": "grouped", "ratio": 4, "kernel_size": 3}
LARGE = "mobilenet_v2 with cbam"
NETWORKS = {
    "gam": lambda: network(**SMALL),
    "grouped": lambda: network(**{**SMALL, "widths": (16, 16), "attention_options": GROUPED}),
    "bam": lambda: network(attention="bam", **SMALL),
    LARGE: lambda: network("mobilenet_v2", "cbam", width_mult=0.25, attention_options={"ratio": 4}),
}


def prepare_all(monkeypatch):
    """Fourier tiles also for what is too small to gain: a test has no time for what gains."""
    slow = choose.PlainCost(*[1.0] * 5)
    machines = [one._replace(plain=slow, plain_by_kernel=slow) for one in choose.MACHINES]
    monkeypatch.setattr(choose, "MACHINES", tuple(machines))


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == LARGE else []) for name in NETWORKS],
)
def test_elsewhere_it_gives_the_same_numbers(name, optimized, tmp_path, monkeypatch):
    prepare_all(monkeypatch)
    model = NETWORKS[name]()
    if optimized:
        model = gam_flax.optimize_for_inference(model, (8, 20, 20, 3))
        prepared = [m for _, m in nnx.iter_modules(model) if isinstance(m, PreparedConv)]
        assert prepared or name.startswith("mobile")
    gam_flax.export_model(model, ("b", 20, 20, 3), tmp_path / "program")
    model.eval()
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 20, 20, 3), np.float32)
        y, platforms = served(tmp_path / "program", x, tmp_path)
        expected = np.asarray(jax.jit(lambda x: model(x))(x))
        assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
        assert np.ptp(expected) > 1e-3
    assert platforms == ["cpu", "cuda", "tpu"]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["nnx", "nnx optimized", "linen"])
def test_the_networks_of_the_examples(kind, tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 28, 28, 1), np.float32)
    if kind == "linen":
        module = example("03_gam_in_linen").Net()
        variables = module.init(jax.random.key(0), jnp.asarray(x))
        model = partial(module.apply, variables)
    else:
        model = example("02_gam_in_nnx").Net(rngs=nnx.Rngs(0))
        model.eval()
    given = gam_flax.optimize_for_inference(model, x.shape) if "optimized" in kind else model
    gam_flax.export_model(given, ("b", 28, 28, 1), tmp_path / "program")
    y, _ = served(tmp_path / "program", x, tmp_path)
    np.testing.assert_allclose(y, model(jnp.asarray(x)), rtol=1e-4, atol=1e-6)
    assert np.ptp(y) > 1e-3


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_each_platform_has_its_own_convolution(optimized, monkeypatch):
    """A CPU multiplies frequencies, the others convolve; the kernel is there in both forms."""
    prepare_all(monkeypatch)
    model = gam_flax.GAM(8, rngs=nnx.Rngs(0))
    if optimized:
        model = gam_flax.optimize_for_inference(model, (8, 20, 20, 8))
    model.eval()
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 20, 20, 8), jnp.float32)
    for platform, convolutions in (("cpu", 0), ("cuda", 2), ("tpu", 2)):
        traced = jax.jit(lambda x: model(x)).trace(x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions, platform


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_comes_back_from_its_spectrum(groups):
    with jax.enable_x64(True):
        conv = nnx.Conv(
            6,
            4,
            (7, 5),
            padding=((3, 3), (2, 2)),
            feature_group_count=groups,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 15, 14, 6)))
        for periods in ((13, 12), (10, 11), (18, 17)):
            prepared = PreparedConv.of(conv, periods)
            spectra = [one[...] for one in prepared.spectra.values()]
            kernel = _kernel(spectra, periods, (7, 5), 6 // groups)
            np.testing.assert_allclose(kernel, conv.kernel[...], atol=1e-14)
            plain = prepared._plain(x, spectra) + prepared.bias[...]
            np.testing.assert_allclose(plain, conv(x), atol=1e-13)


def test_the_model_stays_in_training(tmp_path):
    model = network(**SMALL)
    gam_flax.export_model(model, ("b", 8, 8, 3), tmp_path / "program", platforms=["cpu"])
    assert not model.bn1.use_running_average


def test_bad_calls_are_said(tmp_path):
    with pytest.raises(ValueError, match="platforms must be one of .*'tpu'.*, got 'gpu'"):
        gam_flax.export_model(network(), ("b", 8, 8, 3), tmp_path / "p", platforms=["gpu"])
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="mine: exists"):
        gam_flax.export_model(network(), ("b", 8, 8, 3), tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["gam-flax", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


def test_the_command(tmp_path, run):
    model = network(**SMALL, in_channels=1)
    save(model, tmp_path / "net.safetensors", about={"side": "28"})
    words = (tmp_path / "net.safetensors", tmp_path / "program")
    status, out, _ = run(*words, "--json", "--optimize", "--platforms", "cpu")
    assert status == 0
    said = json.loads(out)
    assert said["input_shape"] == ["b", 28, 28, 1]
    x = np.random.default_rng(0).standard_normal((2, 28, 28, 1), np.float32)
    y, platforms = served(tmp_path / "program", x, tmp_path)
    model.eval()
    np.testing.assert_allclose(y, model(jnp.asarray(x)), rtol=1e-4, atol=1e-5)
    assert platforms == said["platforms"] == ["cpu"]
    status, _, error = run(*words)
    assert status == 2 and "--force" in error
    for wrong in (("--input-shape", "b,32,32,3"), ("--platforms", "gpu"), ("--input-shape", "b,!")):
        status, _, error = run(*words, "--force", *wrong)
        assert status == 2 and error.count("\n") == 1
        assert "net.safetensors: cannot be exported" in error and wrong[1] in error
