from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from omegaconf import MISSING

from cluster.errors import RecipeError, RunError
from cluster.recipes import change_config, config_diff, load_config, load_saved, save_config


@dataclass
class Heatmap:
    method: str = "activation"
    threshold: float = 0.1


@dataclass
class Method:
    name: str = "moco"
    queue: int = 65536
    heatmap: Heatmap = field(default_factory=Heatmap)


@dataclass
class Stage:
    name: str = MISSING
    epochs: float = 1.0
    target_bpp: float | None = None
    trains: list[str] = field(default_factory=list)


@dataclass
class Config:
    data: str = MISSING
    run: str = "runs/one"
    seed: int = 0
    compile: bool = False
    image_size: int = 224
    depths: list[int] = field(default_factory=lambda: [1, 1, 2])
    groups: list[int] | None = None
    init: str | None = None
    ssl: Method = field(default_factory=Method)
    extra: Heatmap | None = None
    stages: list[Stage] = field(default_factory=list)

    def validate(self) -> None:
        if self.image_size % 32:
            raise RunError(f"image_size={self.image_size}: not a multiple of 32")


SMALL = """
image_size: 64   # comments are fine
ssl: {queue: 4096}
stages:
  - {name: ssl, epochs: 10, trains: [backbone]}
  - {name: codec, epochs: 4.5}
"""

TINY = """
base: small
ssl: {heatmap: {threshold: 0.2}}
stages: [{name: codec, epochs: 9}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def load(folder: Path, *overrides: str, recipe: str | Path | None = "small") -> Config:
    return load_config(Config, recipe, ["data=somewhere", *overrides], folder)


def refused(folder: Path, *overrides: str, recipe: str | Path | None = "small", data: bool = True) -> str:
    with pytest.raises(RecipeError) as caught:
        load_config(Config, recipe, [*(["data=somewhere"] if data else []), *overrides], folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_config__recipe_over_defaults(folder: Path):
    config = load(folder)
    assert isinstance(config, Config)
    assert (config.image_size, config.seed, config.ssl.queue, config.ssl.name) == (64, 0, 4096, "moco")
    assert config.stages == [Stage("ssl", 10.0, None, ["backbone"]), Stage("codec", 4.5)]


def test_load_config__base_is_changed_only_where_listed(folder: Path):
    config = load(folder, recipe="tiny")
    assert (config.image_size, config.ssl.queue, config.ssl.heatmap.threshold) == (64, 4096, 0.2)
    assert [(stage.name, stage.epochs) for stage in config.stages] == [("ssl", 10), ("codec", 9)]


def test_load_config__path_of_a_users_recipe_with_base(folder: Path, tmp_path: Path):
    mine = tmp_path / "elsewhere" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("base: tiny\nseed: 7\n")
    (mine.parent / "more.yaml").write_text("base: mine.yaml\ncompile: true\n")
    assert load(folder, recipe=mine).seed == 7
    config = load(folder, recipe=mine.parent / "more.yaml")
    assert (config.compile, config.seed, config.image_size) == (True, 7, 64)


def test_load_config__no_recipe_gives_the_defaults(folder: Path):
    assert load(folder, recipe=None) == Config(data="somewhere")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=3", lambda c: c.seed == 3),
        ("compile=true", lambda c: c.compile is True),
        ("depths=[2,3]", lambda c: c.depths == [2, 3]),
        ("depths=3", lambda c: c.depths == [3]),
        ("depths=2,3", lambda c: c.depths == [2, 3]),
        ("stages.ssl.trains=backbone,redundancy", lambda c: c.stages[0].trains == ["backbone", "redundancy"]),
        ("groups=[16, 32]", lambda c: c.groups == [16, 32]),
        ("groups=null", lambda c: c.groups is None),
        ("init=codec/v1", lambda c: c.init == "codec/v1"),
        ("init=null", lambda c: c.init is None),
        ("run=1e5", lambda c: c.run == "1e5"),
        ("run=on", lambda c: c.run == "on"),
        ("run=2024-01-31", lambda c: c.run == "2024-01-31"),
        ("run=a=b", lambda c: c.run == "a=b"),
        ("ssl.heatmap.threshold=1e-3", lambda c: c.ssl.heatmap.threshold == 1e-3),
        ("ssl.heatmap.threshold=1", lambda c: c.ssl.heatmap.threshold == 1.0),
        ("ssl={name: byol}", lambda c: (c.ssl.name, c.ssl.queue) == ("byol", 4096)),
        ("extra.threshold=0.5", lambda c: c.extra.threshold == 0.5),
        ("stages.0.epochs=3", lambda c: [s.epochs for s in c.stages] == [3, 4.5]),
        ("stages.codec.epochs=3", lambda c: [s.epochs for s in c.stages] == [10, 3]),
        ("stages.codec.target_bpp=0.1", lambda c: c.stages[1].target_bpp == 0.1),
        ("stages.ssl.trains=[backbone,redundancy]", lambda c: c.stages[0].trains == ["backbone", "redundancy"]),
        ("stages.ssl={epochs: 2}", lambda c: (c.stages[0].epochs, c.stages[0].trains) == (2, ["backbone"])),
        ("stages=[{name: only}]", lambda c: c.stages == [Stage("only")]),
    ],
)
def test_load_config__overrides(folder: Path, override: str, read):
    assert read(load(folder, override))


def test_change_config__leaves_the_first_as_it_was_and_checks_keys(folder: Path):
    config = load(folder, "seed=3")
    changed = change_config(config, ["ssl.queue=8", "depths=1,1"])
    assert (changed.seed, changed.ssl.queue, changed.depths) == (3, 8, [1, 1])
    assert config.ssl.queue != 8
    with pytest.raises(RecipeError, match=r"did you mean ssl\.queue"):
        change_config(config, ["ssl.queu=1"])


def test_load_config__the_later_override_wins(folder: Path):
    assert load(folder, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("imagesize=96", ["imagesize=96", "did you mean image_size?"]),
        ("ssl.queu=1", ["ssl.queu=1", "did you mean ssl.queue?"]),
        ("threshold=1", ["threshold", "did you mean ssl.heatmap.threshold"]),
        ("target_bpp=1", ["did you mean stages.NAME.target_bpp?"]),
        ("stages.codec.epoch=1", ["stages.codec.epoch=1", "did you mean stages.codec.epochs?"]),
        ("stages.codc.epochs=1", ["stages.codc.epochs", "did you mean codec?", "ssl, codec"]),
        ("stages.2.epochs=1", ["stages.2.epochs", "'2'", "ssl, codec"]),
        ("zzz=1", ["zzz=1", "data, run, seed"]),
        ("seed=two", ["seed=two", "expected a whole number"]),
        ("seed=1.5", ["seed=1.5", "expected a whole number"]),
        ("seed.x=1", ["seed.x=1", "seed has no options"]),
        ("seed={x: 1}", ["seed={'x': 1}", "expected a whole number"]),
        ("compile=maybe", ["compile=maybe", "expected true or false"]),
        ("depths=[1,a]", ["depths=[1, 'a']", "expected a list, each a whole number"]),
        ("groups=[1,a]", ["groups=[1, 'a']", "expected a list, each a whole number or null"]),
        ("stages.codec.epochs=many", ["stages.codec.epochs=many", "expected a number"]),
        ("stages.codec.target_bpp=low", ["stages.codec.target_bpp=low", "expected a number or null"]),
        ("ssl=moco", ["ssl=moco", "expected options (name, queue, heatmap)"]),
        ("stages=[codec]", ["stages.0=codec", "expected options"]),
        ("seed", ["'seed'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("depths=[1,", ["depths=[1,", "not YAML"]),
        ("seed=${image_size}", ["seed=${image_size}", "write the value itself"]),
        ("run=/x/${oc.env:DICM_SECRET}", ["run=/x/${oc.env:DICM_SECRET}", "write the value itself"]),
        ('groups=[1,"${oc.env:DICM_SECRET}"]', ["groups.1=${oc.env:DICM_SECRET}"]),
    ],
)
def test_load_config__what_is_wrong_is_named_with_the_remedy(folder: Path, override: str, words: list[str]):
    message = refused(folder, override)
    for word in words:
        assert word in message


def test_load_config__a_recipe_or_a_run_of_others_reads_no_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DICM_SECRET", "hunter2")
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("data: x\nstages: [{name: a, epochs: '${oc.env:DICM_SECRET}'}]\n")
    for read in (lambda: load_config(Config, theirs, [], folder), lambda: load_saved(Config, theirs)):
        with pytest.raises(RecipeError, match=r"stages\.0\.epochs=\$\{oc\.env:DICM_SECRET\}") as refusal:
            read()
        assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "override",
    [
        "data=s3://KEY:hunter2@bucket/set", "dta=s3://KEY:hunter2@bucket", "seed=s3://KEY:hunter2/x+y@bucket",
        "data=https://hunter2@host/set", "run=gs://:hunter2@bucket", "stages.codec.epochs=s3://a:hunter2@b",
    ],
)  # fmt: skip
def test_load_config__credentials_in_an_address_are_refused_unseen(folder: Path, tmp_path: Path, override: str):
    key, _, value = override.partition("=")
    (tmp_path / "theirs.yaml").write_text(f"data: x\nrun: {value}\n")
    for recipe, overrides in (("small", [override]), (tmp_path / "theirs.yaml", [])):
        with pytest.raises(RecipeError, match=rf"{key if overrides else 'run'}=\w+://\.\.\.: .*AWS_PROFILE") as refusal:
            load_config(Config, recipe, overrides, folder)
        assert "hunter2" not in str(refusal.value)


def test_load_config__brackets_without_end_are_refused_in_a_line(folder: Path, tmp_path: Path):
    (tmp_path / "theirs.yaml").write_text("data: " + "[" * 10_000)
    with pytest.raises(RecipeError, match=r"theirs\.yaml: cannot be read \(brackets without end\)"):
        load_config(Config, tmp_path / "theirs.yaml", [], folder)


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/me@home/set", "http://127.0.0.1:8000/a@b", "abfs://container@account.dfs.core.windows.net/x",
     "hf://datasets/me/set@v1", "me@host:/x", "sftp://me@host/x"],
)  # fmt: skip
def test_load_config__other_signs_in_an_address_are_no_credentials(folder: Path, address: str):
    assert load_config(Config, "small", [f"data={address}"], folder).data == address


def test_load_config__missing_value_is_named_with_an_example(folder: Path):
    assert "data=DIR" in refused(folder, data=False)
    assert "stages.0.name" in refused(folder, "stages=[{epochs: 1}]")


def test_load_config__unknown_recipe_lists_those_there_are(folder: Path):
    message = refused(folder, recipe="smal")
    assert "'smal'" in message
    assert "did you mean small?" in message
    assert "small, tiny" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nssl: {queue: 1\nrun: x\n", ["line 3", "not YAML"]),
        ("seed: 1\n\tssl: 2\n", ["line 2"]),
        ("seed: 1\nseed: 2\n", ["line 2", "duplicate key seed"]),
        ("imagesize", ["imagesize", "did you mean image_size?"]),
        ("[1, 2]", ["key: value"]),
        ("base: nowhere\n", ["'nowhere'", "small, tiny"]),
        ("base: bad.yaml\n", ["its own base", "bad -> bad"]),
        ("sede: 1\n", ["sede=1", "did you mean seed?"]),
        ("stages: [{name: codec, epoch: 1}]\n", ["stages.codec.epoch=1"]),
    ],
)
def test_load_config__a_bad_recipe_is_named_with_its_line(folder: Path, text: str, words: list[str]):
    (folder / "bad.yaml").write_text(text)
    message = refused(folder, recipe=folder / "bad.yaml")
    for word in words:
        assert word in message


def test_load_config__files_that_are_none(folder: Path):
    assert "No such file" in refused(folder, recipe=folder / "missing.yaml")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml" in refused(folder, recipe=folder / "binary.yaml")


def test_load_config__impossible_values_are_refused_by_the_schema(folder: Path):
    with pytest.raises(RunError, match="image_size=50"):
        load(folder, "image_size=50")


def test_save_config__comes_back_equal(folder: Path, tmp_path: Path):
    config = load(folder, "extra.method=eigencam", "stages.codec.target_bpp=0.1")
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_saved(Config, tmp_path / "run" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_save_config__folder_that_refuses(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match=r"run/config\.yaml: cannot be written"):
        save_config(Config(data="x"), tmp_path / "run" / "config.yaml")


@pytest.mark.parametrize("text", ["data: x\nsede: 1\n", "data: [", "data: x\nseed: many\n", ""])
def test_load_saved__of_another_version_or_damaged(tmp_path: Path, text: str):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"config\.yaml"):
        load_saved(Config, tmp_path / "config.yaml")


def test_load_saved__missing(tmp_path: Path):
    with pytest.raises(RecipeError, match="No such file"):
        load_saved(Config, tmp_path / "config.yaml")


def test_config_diff__names_keys_as_users_write_them(folder: Path):
    before = load(folder)
    after = load(folder, "seed=1", "ssl.heatmap.method=none", "stages.codec.epochs=5")
    assert [tuple(line) for line in config_diff(before, after)] == [
        ("seed", 0, 1),
        ("ssl.heatmap.method", "activation", "none"),
        ("stages.codec.epochs", 4.5, 5.0),
    ]
    assert config_diff(before, load(folder)) == []
