from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.commands import Command, check_command
from cluster.errors import RunError

FILES = [Path("recipes/mine.yaml"), Path("codec/config.json"), Path("dicm.py")]


def check(words: str, **values: str) -> Command:
    """The command as it is checked where its options resolve to those on the line, over `values`."""

    def resolver(recipe: str, overrides: list[str]) -> SimpleNamespace:
        given = dict(override.split("=", 1) for override in overrides)
        return SimpleNamespace(**{"run": "runs/pretrain", **values, **given})

    return check_command(words.split(), Path("."), FILES, resolver)


def test_check_command__files_of_all_options_may_be_shared_packed_or_fetched():
    files = "teacher=/s/t.pt channels=codec/config.json anchor_weights=zoo latents_weights=/s/w.pt"
    written = "cache=bitstreams cache_folder=/s/streams shard_cache=/tmp/cache"
    assert check(f"finetune detection run=/r {files} {written}").run == "/r"


def test_check_command__shared_paths_urls_hub_ids_and_packed_files_pass():
    command = check("finetune detection run=/shared/runs//r50/ data=s3://bucket/coco codec=owner/name@v1")
    assert command == Command(
        ("finetune", "detection", "run=/shared/runs//r50/", "data=s3://bucket/coco", "codec=owner/name@v1"),
        run="/shared/runs/r50",
    )
    assert check("pretrain small run=//shared/runs/r50").run == "/shared/runs/r50"  # one run, however it is spelled
    assert check("pretrain recipes/mine.yaml run=/s/r init=codec checkpoints=s3://b/c").words[1] == "recipes/mine.yaml"
    assert check("export /shared/runs/r50 /shared/codec --onnx").run == "/shared/runs/r50"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "no command; submit one of pretrain, finetune, export"),
        ("data scenes out", "'data' is no command for a job"),
        ("pretrain", "pretrain of what"),
        ("pretrain small data=/d", r"^run=runs/pretrain: .*run=/shared/"),  # the default is relative too
        ("pretrain small run=runs/r50", r"^run=runs/r50: .*thrown away.*run=/shared/"),
        ("pretrain small run=s3://bucket/r50", "^run=s3://bucket/r50: "),
        ("pretrain small run=/r checkpoints=ckpt", "^checkpoints=ckpt: "),
        ("pretrain small run=/r data=data/imagenet", r"^data=data/imagenet: not among.*or a URL"),
        ("pretrain small run=/r data=owner/name", "^data=owner/name: not among"),
        ("finetune detection run=/r cache=bitstreams cache_folder=streams", r"^cache_folder=streams: .*thrown away"),
        ("pretrain small run=/r shard_cache=cache", r"^shard_cache=cache: .*thrown away.*shard_cache=/"),
        ("finetune classification run=/r anchor_weights=elic.pt", "^anchor_weights=elic.pt: not among"),
        ("finetune classification run=/r channels=out/channels.json", "^channels=out/channels.json: not among"),
        ("finetune classification run=/r latents_weights=a/b.pt", "^latents_weights=a/b.pt: not among"),
        ("finetune segmentation run=/r teacher=runs/teacher.pt", "^teacher=runs/teacher.pt: not among"),
        ("finetune detection run=/r codec=exported", "^codec=exported: not among"),
        ("pretrain recipes/other.yaml run=/r", "^recipe recipes/other.yaml: not among"),
        ("pretrain /etc/mine.yaml run=/r", "^recipe /etc/mine.yaml: not among"),
        ("export /r", "two folders"),
        ("export runs/r /codec", "^RUN=runs/r: "),
        ("export /r codec", "^DIR=codec: "),
    ],
)
def test_check_command__refuses_what_a_job_would_lose_or_lack(words: str, said: str):
    with pytest.raises(RunError, match=said) as caught:
        check(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["pretrain small data=s3://K:hunter2@b", "export s3://K:hunter2@b /s/codec"])
def test_check_command__credentials_do_not_become_a_jobs_command(words: str):
    with pytest.raises(RunError, match="holds credentials") as refusal:
        check(words)
    assert "hunter2" not in str(refusal.value)


def test_check_command__a_recipe_of_the_tree_is_found_by_its_full_path(tmp_path: Path):
    (tmp_path / "mine.yaml").touch()
    words = ["pretrain", str(tmp_path / "mine.yaml"), "run=/r"]
    assert check_command(words, tmp_path, [Path("mine.yaml")]).words == ("pretrain", "mine.yaml", "run=/r")
