"""What a name, a path or a spec resolves to, in which order places are searched, and that no socket is opened."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from numpyesm import ESM2
from numpyesm.cli import main
from numpyesm.config import PRESETS, ModelConfig
from numpyesm.errors import CheckpointError, InvalidOption, WeightsNotFound
from numpyesm.weights import cache_dir, convert, find_local, open_weights, resolve, save_canonical
from numpyesm.weights.cache import PINNED_COMMITS
from numpyesm.weights.hub import is_offline
from numpyesm.weights.synthetic import synthetic_checkpoint

TINY = {"esm2-8m": ModelConfig(2, 40, 20, 160), "esm2-35m": ModelConfig(3, 40, 20, 160)}


@pytest.fixture(scope="module", autouse=True)
def small_presets():
    """Published models are tiny here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in TINY.items():
            patch.setitem(PRESETS, name, config)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory, quick_calibration):
    """A real-looking 8M file and a synthetic one."""
    folder = tmp_path_factory.mktemp("models")
    synthetic = synthetic_checkpoint("synthetic:esm2-8m")
    save_canonical(folder / "synthetic.safetensors", synthetic)
    save_canonical(folder / "real.safetensors", replace(synthetic, synthetic=False, source="official"))
    return folder


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """An empty machine: no weights anywhere, no network."""
    monkeypatch.chdir(tmp_path)
    for variable in ("NUMPYESM_WEIGHTS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NUMPYESM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("NUMPYESM_OFFLINE", "1")
    monkeypatch.setattr("numpyesm.weights.locate.checkout_folders", list)


def put(models, path, kind="real"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(models / f"{kind}.safetensors")
    return path


def test_order_of_places_and_names(tmp_path, models, monkeypatch):
    """Each comes before the last one; in a folder, exact weights before those that lost digits."""
    monkeypatch.setattr("numpyesm.weights.locate.checkout_folders", lambda: [tmp_path / "checkout"])
    for name in ("cache/esm2-8m", "checkout/esm2-8m", "weights/esm2-8m-int8", "weights/esm2-8m-bf16",
                 "weights/esm2-8m-fp16", "weights/esm2-8m/any", "weights/esm2_t6_8M_UR50D/any",
                 "weights/esm2_t6_8M_UR50D", "weights/esm2-8m"):  # fmt: skip
        path = put(models, tmp_path / f"{name}.safetensors")
        assert find_local("esm2-8m") == (path.parent if path.stem == "any" else path)
        assert open_weights("esm2-8m").config.name == "esm2-8m"
    assert find_local("esm2-35m") is None
    chosen = put(models, tmp_path / "chosen" / "any.safetensors")
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(chosen))
    assert find_local("esm2-8m") == chosen
    assert resolve("facebook/esm2_t6_8M_UR50D") == chosen
    assert open_weights("esm2_t6_8M_UR50D").source == "official"
    assert ESM2.from_pretrained(backend="numpy").name == "esm2-8m"  # nothing named: whatever the variable holds


def test_variable_that_names_a_folder(tmp_path, models, monkeypatch):
    put(models, tmp_path / "cache" / "esm2-8m.safetensors")  # never used instead
    monkeypatch.setenv("NUMPYESM_WEIGHTS", "")
    with pytest.raises(InvalidOption, match="NUMPYESM_WEIGHTS is set but empty"):
        find_local("esm2-8m")
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(tmp_path / "all"))
    with pytest.raises(WeightsNotFound, match=r"NUMPYESM_WEIGHTS points to .*all, which does not exist"):
        find_local("esm2-8m")
    (tmp_path / "all").mkdir()
    with pytest.raises(WeightsNotFound, match=r"NUMPYESM_WEIGHTS points to the folder .*all, which holds no weights"):
        find_local("esm2-8m")
    checkpoint = put(models, tmp_path / "all" / "last.ckpt")
    assert find_local("esm2-8m") == checkpoint
    assert open_weights("esm2-8m").source == "official"
    put(models, tmp_path / "all" / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"NUMPYESM_WEIGHTS: .*several checkpoints \(best\.ckpt, last\.ckpt\)"):
        find_local("esm2-8m")
    found = put(models, tmp_path / "all" / "esm2-8m.safetensors")
    assert find_local("esm2-8m") == found


@pytest.mark.parametrize("command", [["encode", "MKT"], ["verify"], ["info"], ["demo"]])
def test_no_command_passes_over_what_the_variable_names(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(tmp_path / "none"))
    assert main(command) == 1
    assert "NUMPYESM_WEIGHTS points to" in capsys.readouterr().err


def test_another_model_than_the_one_that_was_asked_for(tmp_path, models, monkeypatch):
    put(models, tmp_path / "weights" / "esm2-35m.safetensors")
    with pytest.raises(CheckpointError, match="safetensors holds esm2-8m, not the esm2-35m"):
        open_weights("esm2-35m")
    for chosen in ("real.safetensors", "."):
        monkeypatch.setenv("NUMPYESM_WEIGHTS", str(models / chosen))
        for ask in (resolve, open_weights):
            with pytest.raises(CheckpointError, match="NUMPYESM_WEIGHTS"):
                ask("esm2-35m")
        assert main(["convert", "esm2-35m", "-o", "out"]) == 1


def test_synthetic_weights_are_never_found_by_a_real_name(tmp_path, models, monkeypatch):
    put(models, tmp_path / "weights" / "esm2-8m.safetensors", "synthetic")
    put(models, tmp_path / "cache" / "esm2-8m.safetensors", "synthetic")
    assert find_local("esm2-8m") is None
    real = put(models, tmp_path / "weights" / "esm2_t6_8M_UR50D.safetensors")
    assert find_local("esm2-8m") == real
    real.unlink()
    with pytest.raises(WeightsNotFound):
        resolve("esm2-8m")
    # named explicitly, they are taken, and say what they are
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(models / "synthetic.safetensors"))
    assert open_weights("esm2-8m").synthetic


def test_specs_that_need_no_search():
    for path in ("none.safetensors", "a/none.pt", "./none", "/none/at/all", Path("none"), "~/none.bin"):
        with pytest.raises(WeightsNotFound, match=r"none.*does not exist"):
            resolve(path)
    for nothing in ("", None, 5, b"esm2-35m"):
        with pytest.raises(InvalidOption, match="names no weights"):
            resolve(nothing)
    with pytest.raises(WeightsNotFound, match="'esm2-4b' is not a known model"):
        resolve("esm2-4b")
    assert resolve("synthetic") == "synthetic:esm2-35m:0"
    assert open_weights("synthetic:esm2_t6_8M_UR50D:7").source == "synthetic:esm2-8m:7"


@pytest.mark.parametrize("name", ["esm2-35m", "someone/model"])
def test_nothing_is_downloaded_without_leave(name):
    with pytest.raises(WeightsNotFound, match=f"no weights of {name} were found on this machine; what you can do: run"):
        open_weights(name, allow_download=False)


def hub_download(folder, commit, content, at_main):
    """What huggingface-hub leaves: blobs named by their SHA-256, links to them by commit."""
    repository = folder / "models--facebook--esm2_t6_8M_UR50D"
    snapshot, blob = repository / "snapshots" / commit, repository / "blobs" / hashlib.sha256(content).hexdigest()
    for place in (snapshot, blob.parent, repository / "refs"):
        place.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (snapshot / "config.json").write_text('{"num_attention_heads": 20}')
    if at_main:
        (repository / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """(expectation of a loaded checkpoint, bytes of its model.safetensors, of its `.pt`, of its regression)."""
    mk = pytest.importorskip("make_checkpoints")
    folder = tmp_path_factory.mktemp("official")
    model = mk.fair_esm_model(TINY["esm2-8m"])
    mk.write_hugging_face(folder, mk.hugging_face_state(model))
    mk.write_fair_esm(folder / "m.pt", model)
    names = ("model.safetensors", "m.pt", "m-contact-regression.pt")
    return partial(mk.expect_same_model, model=model), *((folder / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("variable", "below"), [("HF_HOME", "hub"), ("HF_HUB_CACHE", ""), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_cache_of_huggingface_hub(tmp_path, models, monkeypatch, official, variable, below):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "theirs"))
    for commit in ("2" * 40, "1" * 40, "3" * 40, PINNED_COMMITS["esm2-8m"]):  # each before the last one
        pinned = hub_download(tmp_path / "theirs" / below, commit, official[1], at_main=commit.startswith("3"))
        assert find_local("esm2-8m") == pinned
        if commit.startswith("3"):
            with pytest.warns(UserWarning, match="@333333333333 is another commit of esm2-8m than the pinned"):
                open_weights("esm2-8m")
    assert find_local("esm2-35m") is None
    official[0](open_weights("esm2-8m"))
    assert resolve("facebook/esm2_t6_8M_UR50D") == pinned
    blob = (pinned / "model.safetensors").resolve()
    blob.write_bytes(official[1][:-4] + b"\0\0\0\0")
    for read in (open_weights, lambda name: convert(resolve(name), tmp_path)):
        with pytest.raises(CheckpointError, match="is corrupted: its checksum is not the one"):
            read("esm2-8m")
    for commit in "123":
        shutil.rmtree(pinned.with_name(commit * 40))
    blob.unlink()  # interrupted: the links stand there, or only the configuration
    assert find_local("esm2-8m") is None
    ours = put(models, tmp_path / "cache" / "esm2-8m.safetensors")
    assert find_local("esm2-8m") == ours


@pytest.mark.parametrize(("variable", "below"), [("TORCH_HOME", ""), ("XDG_CACHE_HOME", "torch")])
def test_cache_of_torch_hub(tmp_path, monkeypatch, official, variable, below):
    monkeypatch.setenv(variable, str(tmp_path / "theirs"))
    folder = tmp_path / "theirs" / below / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "esm2_t6_8M_UR50D.pt").write_bytes(official[2])
    (folder / "esm2_t6_8M_UR50D-contact-regression.pt").write_bytes(official[3])
    assert find_local("esm2-8m") == folder / "esm2_t6_8M_UR50D.pt"
    official[0](open_weights("esm2-8m"))
    (folder / "esm2_t12_35M_UR50D.pt").write_bytes(official[2])
    with pytest.warns(UserWarning, match="does not have the SHA-256 of the published"), pytest.raises(CheckpointError):
        open_weights("esm2-35m")  # an 8M model under that name
    (folder / "esm2_t6_8M_UR50D.pt").write_bytes(official[2].replace(official[2][9000:9004], b"\1\2\3\4", 1))
    with pytest.raises(CheckpointError, match=r"esm2_t6_8M_UR50D\.pt .*corrupted"):
        open_weights("esm2-8m")


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("NUMPYESM_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "numpyesm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("~/.cache/numpyesm").expanduser()
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_dir() == tmp_path / "local" / "numpyesm"


# -- machines without a network --------------------------------------------------------------------------------------


class SocketOpened(BaseException):
    """Not an Exception, which somebody could catch."""


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*args: object, **kwargs: object):
        raise SocketOpened(args)

    monkeypatch.setattr(socket, "socket", type("Refusing", (socket.socket,), {"__init__": refuse}))
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.parametrize(
    ("variable", "arguments"),
    [
        ("NUMPYESM_OFFLINE", ("fetch", "esm2-8m")),
        ("HF_HUB_OFFLINE", ("fetch", "someone/else")),
        ("HF_HUB_OFFLINE", ("fetch", "esm2-8m", "-o", "there")),
        ("NUMPYESM_OFFLINE", ("encode", "MKT")),
        ("HF_HUB_OFFLINE", ("encode", "MKT", "--weights", "someone/else")),
    ],
)
def test_offline_nothing_asks_the_network(run, no_sockets, monkeypatch, variable, arguments):
    monkeypatch.setenv("NUMPYESM_OFFLINE", "0")
    with pytest.raises(SocketOpened):  # it would, if it were allowed to
        run(*arguments, bare=True)
    monkeypatch.setenv(variable, "1")
    done = run(*arguments, bare=True)
    assert done.code == 1
    assert "forbids downloading" in done.err
    ways = ["`numpyesm fetch", "into weights/", "point NUMPYESM_WEIGHTS to it", "ask for 'synthetic"]
    if "someone/else" not in arguments:
        official = "esm2_t6_8M_UR50D" if "esm2-8m" in arguments else "esm2_t12_35M_UR50D"
        ways += [f"fair-esm/models/{official}.pt", f"fair-esm/regression/{official}-contact-regression.pt"]
    assert all(way in done.err for way in ways)


@pytest.mark.parametrize(
    ("value", "forbidden"),
    [("1", True), ("TRUE", True), (" yes ", True), ("y", True), ("2", True), ("", False), ("0", False), ("No", False)],
)
def test_what_is_not_a_no_forbids(monkeypatch, value, forbidden):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NUMPYESM_OFFLINE", value)
    assert is_offline() is forbidden


@pytest.mark.parametrize("arguments", [("encode", "MKT"), ("predict", "M<mask>"), ("info",)])
def test_work_on_local_weights_opens_no_socket(run, no_sockets, monkeypatch, arguments):
    """Not even without the variables."""
    monkeypatch.delenv("NUMPYESM_OFFLINE")
    assert run(*arguments).code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((f"{command} --weights=", "unset") for command in ("encode MKT", "verify", "info", "score MKT x.csv")),
        ("fetch ''", "not an empty text"),
        ("fetch esm2-8m -o ''", "not an empty text"),
        ("fetch esm2-8m --revision=", "not an empty text"),
        ("convert '' -o x", "not an empty text"),
        ("convert synthetic:esm2-8m -o ''", "not an empty text"),
        ("convert synthetic:esm2-8m -o x --regression=", "not an empty text"),
        ("serve --model mine=", "'mine=': expected SLUG=WEIGHTS"),
        ("serve --api-keys-file=", "not an empty text"),
    ],
)
def test_what_is_named_and_empty_is_wrong_use(run, tmp_path, command, message):
    """`-o "$STICK"` where STICK is not set must become neither a default nor a download."""
    done = run(*shlex.split(command), bare=True)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "x").exists()
