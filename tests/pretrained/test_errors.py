"""What is wrong with a checkpoint is said by file and key, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file

import zoo
from zoo.pretrained import hub, shards, sparse_blocks

KEY = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture
def broken(checkpoints, tmp_path) -> Path:
    """A copy of a checkpoint, to break."""
    shutil.copytree(checkpoints["olmoe"], tmp_path / "broken")
    return tmp_path / "broken"


def shard_of(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_shard(folder: Path, key: str, change) -> Path:
    path = shard_of(folder, key)
    held = load_file(path)
    change(held)
    save_file(held, path, metadata={"format": "pt"})
    return path


def raises(folder: Path, error: type[Exception], *parts: object, **options: object):
    with pytest.raises(error) as caught:
        zoo.from_pretrained(folder, **options)
    for part in parts:
        assert str(part) in str(caught.value)


def test_an_unknown_family_is_named_with_the_nearest(broken):
    edit(broken / "config.json", lambda c: c.update(model_type="olmoe2"))
    raises(broken, ValueError, broken / "config.json", "'olmoe2'; did you mean olmoe")
    edit(broken / "config.json", lambda c: c.pop("model_type"))
    raises(broken, ValueError, broken / "config.json", "no model_type")


def test_a_missing_key_is_named(broken):
    path = change_shard(broken, KEY, lambda held: held.pop(KEY))
    raises(broken, ValueError, path, KEY, "missing")
    edit(broken / "model.safetensors.index.json", lambda index: index["weight_map"].pop(KEY))
    raises(broken, ValueError, broken / "model.safetensors.index.json", KEY, "1 tensor (")


def test_a_surplus_key_is_named(broken):
    path = change_shard(broken, KEY, lambda held: held.update({"model.layers.7.norm.weight": torch.ones(2)}))
    raises(broken, ValueError, path, "model.layers.7.norm.weight", "unknown to olmoe")


def test_a_configuration_of_another_size_is_a_surplus_or_a_shape(broken):
    edit(broken / "config.json", lambda c: c.update(num_hidden_layers=1))
    raises(broken, ValueError, "model.layers.1.", "unknown to olmoe")
    edit(broken / "config.json", lambda c: c.update(num_hidden_layers=2, vocab_size=255))
    raises(broken, ValueError, shard_of(broken, "lm_head.weight"), "[256, 64], expected [255, 64]")


def test_a_wrong_shape_is_named_with_both_shapes(broken):
    path = change_shard(broken, KEY, lambda held: held.update({KEY: held[KEY].T.contiguous()}))
    raises(broken, ValueError, path, KEY, "[64, 128], expected [128, 64]")


def test_a_missing_shard_is_named_with_a_key_it_should_hold(broken):
    shard_of(broken, KEY).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-\d+-of-\d+.safetensors: no such file; .* places tensor model\."
    ):
        zoo.from_pretrained(broken)


@pytest.mark.parametrize("kept", [-1, 0.5, 100, 5])
def test_a_truncated_file_is_named(broken, kept):
    path = shard_of(broken, KEY)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    raises(broken, ValueError, path, "truncated" if kept != 5 else "not a safetensors file")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 50, b"version https://git-lfs.github.com/spec/v1\n"])
def test_another_kind_of_file_is_refused(broken, content):
    path = shard_of(broken, KEY)
    path.write_bytes(content)
    raises(broken, ValueError, path, "not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2]",
        b"{not json",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
    ],
)
def test_a_header_that_contradicts_itself_is_refused(broken, header):
    path = shard_of(broken, KEY)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    raises(broken, ValueError, path)


def test_pickled_weights_are_not_read(broken):
    for path in broken.glob("model*"):
        path.unlink()
    torch.save({}, broken / "pytorch_model.bin")
    raises(broken, FileNotFoundError, broken, "found pytorch_model.bin", "unpickling executes code")


def test_an_index_that_points_outside_the_folder_is_refused(broken):
    edit(broken / "model.safetensors.index.json", lambda i: i["weight_map"].update({KEY: "../elsewhere.safetensors"}))
    raises(broken, ValueError, "'../elsewhere.safetensors' is not a file name")


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": [1]}'])
def test_a_broken_index_is_named(broken, content):
    (broken / "model.safetensors.index.json").write_text(content)
    raises(broken, ValueError, broken / "model.safetensors.index.json")


def test_quantised_checkpoints_are_refused_by_name(broken):
    edit(broken / "config.json", lambda c: c.update(quantization_config={"quant_method": "hqq"}))
    raises(broken, ValueError, broken / "config.json", "quant_method='hqq'", "fp8, mxfp4, compressed-tensors")
    edit(broken / "config.json", lambda c: c.pop("quantization_config"))
    path = change_shard(broken, KEY, lambda held: held.update({KEY: held[KEY].to(torch.float8_e4m3fn)}))
    raises(broken, ValueError, path, KEY, "F8_E4M3")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    raises(tmp_path, FileNotFoundError, tmp_path / "config.json")
    (tmp_path / "file").touch()
    raises(tmp_path / "file", NotADirectoryError, "is a file")
    raises(tmp_path / "nowhere", FileNotFoundError, "no such folder")
    raises(tmp_path, FileNotFoundError, tmp_path / "config.json", num_classes=3)  # an option of other folders
    for kind in ("mixtral", "gemma"):  # a table of ours, and transformers' own
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(TypeError, match="dtpe"):
            zoo.from_pretrained(tmp_path, dtpe="float32")


def test_no_network_is_said_with_the_repository(monkeypatch, tmp_path):
    def offline(repo_id, **options):
        raise OSError("network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConnectionError, match=r"nobody/nothing: .* OSError: network is unreachable"):
        zoo.from_pretrained("nobody/nothing", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_hubs_cache_is_used_without_network(checkpoints, tmp_path):
    # The layout of the hub's cache: refs name a commit, snapshots hold its files.
    repository = tmp_path / "models--someone--moe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoints["mixtral"], repository / "snapshots" / ("0" * 40))
    model = zoo.from_pretrained("someone/moe", cache_dir=tmp_path, local_files_only=True)
    assert model.config.model_type == "mixtral"
    with pytest.raises(ConnectionError, match="someone/other"):
        zoo.from_pretrained("someone/other", cache_dir=tmp_path, local_files_only=True)


def test_only_weights_and_configurations_are_asked_of_the_hub(monkeypatch, checkpoints):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(checkpoints["olmoe"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    zoo.from_pretrained("someone/moe", revision="v1", token="t")
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("someone/moe", "v1", "t")
    assert asked["allow_patterns"] == ["*.safetensors", "*.json"] == hub.PATTERNS


@pytest.fixture(scope="module")
def model(checkpoints):
    return zoo.from_pretrained(checkpoints["mixtral"])


def test_a_folder_with_something_in_it_is_not_overwritten(model, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; give overwrite=True"):
        zoo.save_pretrained(model, target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    zoo.save_pretrained(model, target, overwrite=True, max_shard_size="300KB")
    assert (target / "notes.txt").read_text() == "mine"
    shards = set(target.glob("model-*"))
    assert len(shards) > 2
    zoo.save_pretrained(model, target, overwrite=True)
    assert {path.name for path in target.iterdir()} == {
        "notes.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    zoo.from_pretrained(target)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        zoo.save_pretrained(model, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_fails_leaves_nothing_behind(model, tmp_path, monkeypatch, existing):
    if existing:
        zoo.save_pretrained(model, tmp_path / "target")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = []

    def full_disk(path, tensors):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr(shards, "write_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        zoo.save_pretrained(model, tmp_path / "target", max_shard_size="300KB", overwrite=existing)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == ([tmp_path / "target"] if existing else [])


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_a_folder_is_followed_and_stays(model, tmp_path, there):
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "out").mkdir()
    link = tmp_path / "link"
    link.symlink_to(disk / "out")
    for overwrite in (False, True):
        zoo.save_pretrained(model, link, overwrite=overwrite)
        assert link.is_symlink()
        assert (disk / "out" / "model.safetensors").is_file()
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
    zoo.from_pretrained(link)


@pytest.mark.parametrize("mounted", [True, False])
def test_a_folder_that_cannot_be_replaced_is_written_into(model, tmp_path, monkeypatch, mounted):
    """As of a container: the target is a disk of its own, or all around it may only be read."""
    target = tmp_path / "target"
    target.mkdir()
    access = os.access
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    monkeypatch.setattr(Path, "rename", lambda *paths: pytest.fail("renamed"))
    monkeypatch.setattr(Path, "rmdir", lambda path: pytest.fail("removed"))
    for overwrite in (False, True):
        zoo.save_pretrained(model, target, overwrite=overwrite)
        assert {p.name for p in target.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    zoo.from_pretrained(target)


def test_what_has_no_published_layout_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="Linear has no published layout; expected a model of mixtral"):
        zoo.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(TypeError, match="no published layout"):
        zoo.save_pretrained(zoo.models.dense_twin("language/mixtral_tiny"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("router", "option"),
    [
        ({"name": "TopKRouter", "k": 1, "normalize": True}, "k=1"),
        ({"name": "TopKRouter"}, "normalize=False"),
        ({"name": "TopKRouter", "normalize": True, "score": "sigmoid"}, "score='sigmoid'"),
        ({"name": "TopKRouter", "normalize": True, "scale": 2.0}, "scale=2.0"),
        ({"name": "TopKRouter", "normalize": True, "selection_bias": True}, "selection_bias=True"),
        ({"name": "TopKRouter", "normalize": True, "num_groups": 4, "group_topk": 2}, "groups="),
        ({"name": "TopKRouter", "normalize": True, "bias": True}, "no place for the tensor router.bias"),
    ],
)
def test_a_gate_that_the_layout_cannot_express_is_not_saved(router, option, tmp_path):
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=1, router=router)
    with pytest.raises(ValueError, match=option):
        zoo.save_pretrained(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_same_decision_said_otherwise_is_saved(tmp_path):
    router = {"name": "TopKRouter", "score": "softmax_topk", "jitter": 0.1, "losses": {"z": 0.1}}
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", router=router), tmp_path / "x")
    assert zoo.from_pretrained(tmp_path / "x").model.layers[0].mlp.router.normalize


@pytest.mark.parametrize("size", ["5 PB", "big", 0, "0KB"])
def test_a_size_that_is_none_is_refused(model, size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        zoo.save_pretrained(model, tmp_path / "x", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_every_family_is_tested():
    from zoo.pretrained.language import FAMILIES as TABLE

    assert set(FAMILIES) == set(TABLE)


def test_experts_that_an_older_transformers_holds_otherwise_are_named():
    older = SimpleNamespace(experts=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Linear of transformers \S+ does not hold its experts as newer versions do"):
        sparse_blocks._moe(older, next(iter(sparse_blocks.BLOCKS.values())), None, None, {}, "auto")
