"""What a name, a path or a spec resolves to, and in which order places are searched."""

from __future__ import annotations

from pathlib import Path

import pytest

from numpyesm.config import PRESETS
from numpyesm.errors import CheckpointError, InvalidOption, WeightsNotFound
from numpyesm.weights import cache_dir, find_local, open_weights, resolve, save_canonical
from numpyesm.weights.checkpoint import Checkpoint
from numpyesm.weights.synthetic import synthetic_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A real-looking 8M file and a synthetic one."""
    folder = tmp_path_factory.mktemp("models")
    synthetic = synthetic_checkpoint("esm2-8m")
    save_canonical(folder / "synthetic.safetensors", synthetic)
    save_canonical(folder / "real.safetensors", Checkpoint(PRESETS["esm2-8m"], synthetic.tensors, source="official"))
    return folder


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """An empty machine: no weights anywhere, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUMPYESM_WEIGHTS", raising=False)
    monkeypatch.setenv("NUMPYESM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMPYESM_OFFLINE", "1")
    monkeypatch.setattr("numpyesm.weights.locate._checkout_weights", list)


def put(models, path, kind="real"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(models / f"{kind}.safetensors")
    return path


def test_order_of_places(tmp_path, models, monkeypatch):
    cache = put(models, tmp_path / "cache" / "esm2-8m.safetensors")
    assert find_local("esm2-8m") == cache
    checkout = put(models, tmp_path / "checkout" / "esm2-8m.safetensors")
    monkeypatch.setattr("numpyesm.weights.locate._checkout_weights", lambda: [checkout.parent])
    assert find_local("esm2-8m") == checkout
    local = put(models, tmp_path / "weights" / "esm2-8m.safetensors")
    assert find_local("esm2-8m") == local
    chosen = put(models, tmp_path / "chosen" / "any.safetensors")
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(chosen))
    assert find_local("esm2-8m") == chosen
    assert resolve("facebook/esm2_t6_8M_UR50D") == chosen
    assert open_weights("esm2_t6_8M_UR50D").source == "official"


@pytest.mark.parametrize("name", ["esm2-8m", "esm2-8m-fp16", "esm2-8m-bf16", "esm2_t6_8M_UR50D"])
def test_file_names(tmp_path, models, name):
    path = put(models, tmp_path / "weights" / f"{name}.safetensors")
    assert find_local("esm2-8m") == path
    assert find_local("esm2-35m") is None


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2-8m"])
def test_subfolders(tmp_path, models, name):
    put(models, tmp_path / "weights" / name / "anything.safetensors")
    assert find_local("esm2-8m") == tmp_path / "weights" / name
    assert open_weights("esm2-8m").config.name == "esm2-8m"


def test_variable_that_names_a_folder(tmp_path, models, monkeypatch):
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(tmp_path / "all"))
    with pytest.raises(WeightsNotFound, match="NUMPYESM_WEIGHTS points to"):
        find_local("esm2-8m")
    (tmp_path / "all").mkdir()
    assert find_local("esm2-8m") is None
    found = put(models, tmp_path / "all" / "esm2-8m.safetensors")
    assert find_local("esm2-8m") == found


def test_variable_that_names_another_model(models, monkeypatch):
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(models / "real.safetensors"))
    for ask in (resolve, open_weights):
        with pytest.raises(CheckpointError, match=r"from NUMPYESM_WEIGHTS.*holds esm2-8m, not the esm2-35m"):
            ask("esm2-35m")


def test_another_model_under_a_wrong_name(tmp_path, models):
    put(models, tmp_path / "weights" / "esm2-35m.safetensors")
    with pytest.raises(CheckpointError, match="holds esm2-8m, not the esm2-35m"):
        open_weights("esm2-35m")


def test_synthetic_weights_are_never_found_by_a_real_name(tmp_path, models, monkeypatch):
    put(models, tmp_path / "weights" / "esm2-8m.safetensors", "synthetic")
    put(models, tmp_path / "cache" / "esm2-8m.safetensors", "synthetic")
    assert find_local("esm2-8m") is None
    real = put(models, tmp_path / "weights" / "esm2_t6_8M_UR50D.safetensors")
    assert find_local("esm2-8m") == real
    # nor by one who would fetch it
    monkeypatch.setenv("NUMPYESM_OFFLINE", "1")
    real.unlink()
    with pytest.raises(WeightsNotFound):
        resolve("esm2-8m")
    # named expressly, they are taken, and say what they are
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(models / "synthetic.safetensors"))
    assert open_weights("esm2-8m").synthetic


def test_synthetic_specs():
    assert resolve("synthetic") == "synthetic:esm2-35m:0"
    assert open_weights("synthetic:esm2-8m:3").source == "synthetic:esm2-8m:3"
    with pytest.raises(InvalidOption):
        resolve("synthetic:nonsense")


@pytest.mark.parametrize(
    "spec", ["none.safetensors", "a/none.pt", "./none", "/none/at/all", Path("none"), "~/none.bin"]
)
def test_paths_that_do_not_exist_are_named(spec):
    with pytest.raises(WeightsNotFound, match=r"none.*does not exist"):
        resolve(spec)


def test_unknown_names():
    with pytest.raises(WeightsNotFound, match="'esm2-3b' is no known model"):
        resolve("esm2-3b")


@pytest.mark.parametrize("name", ["esm2-35m", "someone/model"])
@pytest.mark.parametrize("download", [True, False])
def test_nothing_found_names_the_ways_out(name, download):
    with pytest.raises(WeightsNotFound) as caught:
        open_weights(name, allow_download=download)
    text = str(caught.value)
    for way in ("numpyesm fetch", "weights/", "NUMPYESM_WEIGHTS", "synthetic"):
        assert way in text
    if name == "esm2-35m":
        assert "https://dl.fbaipublicfiles.com/fair-esm/models/esm2_t12_35M_UR50D.pt" in text
        assert "regression/esm2_t12_35M_UR50D-contact-regression.pt" in text


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("NUMPYESM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "numpyesm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("~/.cache/numpyesm").expanduser()
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_dir() == tmp_path / "local" / "numpyesm"
