"""Commands of the tasks: `dicm finetune`, `evaluate`, `predict`, `select-channels`, `report`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer()
anchors = typer.Typer(no_args_is_help=True, help="Codecs of pixels to compare with.")
app.add_typer(anchors, name="anchors")
console = Console(highlight=False, markup=False)  # names stay as they are
TASK_NAMES = "classification, detection, instance_segmentation, semantic_segmentation"


@app.command()
def finetune(
    task: Annotated[str, typer.Argument(help=f"{TASK_NAMES}, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options to change.")] = None,
) -> None:
    """Fine-tune a task on the frozen codec, then measure accuracy and rate on real streams.

    Example: dicm finetune detection codec=codec data=data/voc run=runs/objects
    """
    from downstream.finetune import resolve

    config = resolve(task, overrides or [])
    _run(config)


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(metavar="TASK|RUN", help=f"{TASK_NAMES}; or a run folder, measured again.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of a task: what to sweep over.")
    ] = None,
) -> None:
    """Sweep a task over codecs and rates; or measure one fine-tuned run again.

    A sweep starts from runs on clean pixels: dicm finetune TASK codec=codec data=data/tiny input=pixels run=runs/clean

    Example: dicm evaluate classification runs=runs/clean anchors=jpeg,hevc qualities=40,47 out=runs/sweep
    """
    from downstream.tasks import TASKS

    if what not in TASKS:
        if overrides:
            raise typer.BadParameter(f"{what} is no task; options are for sweeps: dicm evaluate TASK runs={what} ...")
        from downstream.finetune import evaluate_run

        _print(what, evaluate_run(Path(what)))
        return
    from downstream.errors import StoppedError
    from downstream.evaluation.points import resolve
    from downstream.evaluation.sweep import sweep

    config = resolve(what, overrides or [])
    try:
        rows = sweep(config, lambda progress: console.print(_line(progress), soft_wrap=True))
    except StoppedError:
        console.print(f"stopped; the same command goes on with {config.out}", soft_wrap=True)
        return
    _print_sweep(config.out, rows, config.against)


@app.command()
def predict(
    task: Annotated[str, typer.Argument(help=f"{TASK_NAMES}.")],
    run: Annotated[Path, typer.Argument(help="Run folder of `dicm finetune`.")],
    sources: Annotated[list[Path], typer.Argument(metavar="IMAGE|STREAM...", help="Files, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for NAME.png and NAME.json.")],
    score: Annotated[float, typer.Option(help="Least score of what is drawn, 0..1; JSON has everything.")] = 0.5,
    codec: Annotated[str | None, typer.Option(help="The run's codec, where it has moved.")] = None,
) -> None:
    """Apply a fine-tuned run to images or to streams of `dicm encode`; write pictures and JSON.

    Example: dicm predict detection runs/objects streams/ -o found
    """
    from downstream.predict import predict_files

    done = predict_files(task, run, sources, out, score, codec)
    for reason in done.rejected:
        console.print(f"left out: {reason}", soft_wrap=True)
    console.print(
        f"{done.num_files} files -> {out}, {done.bits_per_pixel:.4f} bpp"
        + (f", {len(done.rejected)} left out" if done.rejected else ""),
        soft_wrap=True,  # names stay whole, to be copied
    )


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN|SWEEP...", help="Folders of `dicm finetune`, or of `dicm evaluate`.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Folder for the same as README.md with PNG files.")] = None,
    pretraining: Annotated[Path | None, typer.Option(help="Run folder of `dicm pretrain`, for its pictures.")] = None,
    against: Annotated[str, typer.Option(help="Sweeps: the codec that BD-rates are relative to.")] = "hevc",
    ablation: Annotated[
        list[str] | None, typer.Option(help="Sweeps: label of a codec without a part, set beside the whole one.")
    ] = None,
) -> None:
    """Write one self-contained HTML file with curves, tables and pictures of fine-tuned runs, or of sweeps.

    Example: dicm report runs/sweep --markdown docs/results/evidence -o report.html
    """
    from downstream.evaluation.report import document_of

    document = document_of(folders, pretraining, against, ablation or [])
    document.write_html(out)
    console.print(f"wrote {out}", soft_wrap=True)
    if markdown is not None:
        document.write_markdown(markdown)
        console.print(f"wrote {markdown}/README.md", soft_wrap=True)


@app.command("select-channels")
def select_channels(
    run: Annotated[Path, typer.Argument(help="Run folder of a fine-tune with gate=dynamic.")],
    num: Annotated[int, typer.Option(help="How many channels to keep.")] = 32,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file to write; default RUN/channels_NUM.json.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Bar chart to write, PNG; default beside the JSON file.")] = None,
) -> None:
    """Choose the channels of the latent that a run's gate chose most often over its training set.

    Example: dicm select-channels runs/dynamic --num 32
    """
    from downstream.channels import select_channels as select

    written, drawn = select(run, num, out, chart)
    console.print(f"wrote {written} and {drawn}; next: gate=static channels={written}", soft_wrap=True)


@anchors.command("train")
def train_anchor(
    model: Annotated[str, typer.Argument(help="Model of CompressAI's: mbt2018-mean, elic2022-official, ...")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options to change.")] = None,
) -> None:
    """Train a pixel codec of CompressAI's on your images, at one quality; the same command again resumes.

    Writes RUN.safetensors. Runs called FOLDER/NAME-QUALITY make FOLDER a set: dicm evaluate ... anchor_weights=FOLDER.

    Example: dicm anchors train mbt2018-mean data=data/tiny quality=2 run=anchors/mbt2018-mean-2
    """
    from downstream.finetune import resolve
    from downstream.tasks.anchor import weights_path

    config = resolve("anchor", [f"model={model}", *(overrides or [])])
    if _run(config):
        console.print(f"wrote {weights_path(Path(config.run))}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and the report.")] = Path("demo"),
) -> None:
    """The whole path on made-up scenes: data, pretraining on two Ray workers, export, classification, report.

    Example: dicm demo --out demo
    """
    from downstream.demo import run_demo

    run_demo(out, console)


def _run(config: Any) -> bool:
    """Fine-tune and show the results; False where the run was told to stop, which is no error."""
    from downstream.errors import StoppedError
    from downstream.finetune import run

    try:
        results = run(config)
    except StoppedError as stopped:
        console.print(str(stopped), soft_wrap=True)
        return False
    _print(config.run, results)
    return True


def _line(progress: Any) -> str:
    row = progress.row
    rate = f"{row['bpp_payload']:.4f} bpp payload, {row['metric']} {100 * (row['value'] or 0):.1f} %"
    return f"{progress.done}/{progress.total}  {row['run']}  {row['codec']} {row['quality']} {row['protocol']}: {rate}"


def _print_sweep(out: str, rows: list[dict[str, Any]], against: str) -> None:
    from downstream.evaluation.rate_accuracy import curves_of, deltas
    from downstream.results import percent

    shown = Table("codec", "protocol", "quality", "bpp, payload", rows[0]["metric"], "seeds")
    for curve in curves_of(rows):
        for point in curve.points:
            spread = f" ± {100 * point.accuracy_spread:.1f}" if point.num_seeds > 1 else ""
            shown.add_row(
                curve.codec, curve.protocol, point.quality, f"{point.bpp:.4f}", percent(point.accuracy) + spread,
                str(point.num_seeds),
            )  # fmt: skip
    console.print(shown)
    gains = Table(f"against {against}", "protocol", "BD-rate", "BD-accuracy, points", "warnings")
    for curve, gain in deltas(curves_of(rows), against):
        gains.add_row(curve.codec, curve.protocol, gain.rate_text, gain.accuracy_text, "; ".join(gain.warnings))
    if gains.row_count:
        console.print(gains)
    console.print(f"wrote {out}/results.csv and results.json", soft_wrap=True)


def _print(run: str, results: dict[str, Any]) -> None:
    from downstream.results import table

    source = results["anchor"] or ("clean pixels" if results["input"] == "pixels" else "codec streams")
    console.print(run, soft_wrap=True)  # above the table: as its title a long path would be broken into lines
    shown = Table(results["task"], source)
    for title, value in table(results).items():
        shown.add_row(title, value)
    console.print(shown)
    for reason, count in results.get("left_out", {}).items():
        console.print(f"{count} x {reason}", highlight=False)
