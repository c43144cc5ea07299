"""gam-flax: the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gam_flax.convert.blocks import Block, identify
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import check_free, whole_file
from gam_flax.convert.layouts import VARIANTS
from gam_flax.convert.source import open_source
from gam_flax.detection.command import detect
from gam_flax.export.command import export
from gam_flax.maps.command import maps
from gam_flax.train.command import train
from gam_flax.train.errors import LIBRARIES

app = typer.Typer(
    help="GAM and its relatives for JAX and Flax: port PyTorch checkpoints and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True)

EXTRAS = {"torch": "torch", "matplotlib": "plots", "PIL": "images", "tensorboardX": "tensorboard"}
EXTRAS |= {"flatbuffers": "export", "pycocotools": "detection"}
EXTRAS |= dict.fromkeys(LIBRARIES, "train")
"""Library → what to install it with."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Variant = Annotated[
    list[str] | None,
    typer.Option(
        help="What the weights cannot tell, such as 'gated'; 'cbam=timm' for one kind of block."
    ),
]


@app.command()
def inspect(file: Path, as_json: Json = False) -> None:
    """What is in a checkpoint: the blocks found, their family and sizes, what is ambiguous."""
    checkpoint = open_source(file)
    blocks = identify(checkpoint)
    if as_json:
        print(json.dumps({**_summary(checkpoint), "blocks": [_block_json(b) for b in blocks]}))
        return
    summary = _summary(checkpoint)
    stripped = ", ".join(checkpoint.stripped)
    console.print(
        f"{shorten(file)}: {summary['container']}, {summary['tensors']} tensors, "
        f"{summary['values']:,} values, {summary['dtypes']}"
        + (f"; taken off: {stripped}" if stripped else "")
    )
    if summary["not_finite"]:
        console.print(
            f"NaN or infinity in {len(summary['not_finite'])} tensors, such as "
            f"{shorten(summary['not_finite'][0])}"
        )
    if not blocks:
        console.print("no attention block found")
        return
    console.print(_block_table(blocks))
    for block in blocks:
        if block.refusal:
            console.print(Text(str(block)))
    for kind in sorted({block.kind for block in blocks if block.ambiguous}):
        found = {
            f"{name} ({family})" if name != family else name: None
            for block in blocks
            if block.kind == kind
            for name, family in zip(block.variants, block.families, strict=True)
        }
        console.print(
            f"The same {kind.upper()} weights could be {', '.join(found)}: say --variant, or let "
            "`gam-flax verify` decide from a saved --input and --output."
        )


@app.command()
def convert(
    source: Path,
    destination: Path,
    variant: Variant = None,
    to: Annotated[str, typer.Option(help="flax or torch.")] = "flax",
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16, float32 or float64; default: as it is.")
    ] = None,
    yaml: Annotated[str | None, typer.Option(help="Of a YOLOv5, instead of its own.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Port a checkpoint to a file in the other framework's layout, without building a model."""
    from gam_flax.convert.port import DTYPES, convert_file

    _check_choice("--to", to, ("flax", "torch"))
    _check_choice("--dtype", dtype, (None, *DTYPES))
    report = convert_file(
        source,
        destination,
        variant=_variants(variant),
        to=to,  # type: ignore[arg-type]
        dtype=dtype,
        yaml=yaml,
        force=force,
    )
    if as_json:
        print(report.to_json())
        return
    console.print(f"{shorten(source)} → {shorten(destination)} ({to})")
    console.print(Text(str(report)))
    for path, name in report.variants.items():
        console.print(Text(f"{shorten(path) or 'the block'}: {name}"))


@app.command()
def verify(
    source: Path,
    variant: Variant = None,
    block: Annotated[
        str | None, typer.Option(help="Path of one block, where the file holds several.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Build the whole network of this name; see list_models().")
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help=".npy that went into the block.")
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help=".npy that came out of the block.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build both twins, run both in float64, and print where they agree; or decide the variant."""
    checkpoint = open_source(source)
    if (input_file is None) != (output_file is None):
        raise CheckpointError("--input and --output go together: one pair of the true block")
    if input_file is not None and output_file is not None:
        _decide_by_pair(checkpoint, block, input_file, output_file, as_json)
        return
    from gam_flax.parity.verify import verify_blocks, verify_model

    if model is not None or "build" in checkpoint.metadata:
        reports = verify_model(checkpoint, model, _variants(variant))
    else:
        reports = verify_blocks(checkpoint, _chosen(checkpoint, block), _variants(variant))
    if as_json:
        print(json.dumps({name: json.loads(report.to_json()) for name, report in reports.items()}))
    else:
        for name, report in reports.items():
            console.print(Text(name, style="bold"))
            console.print(report)
    if not all(report.ok for report in reports.values()):
        raise typer.Exit(1)


@app.command()
def parity(
    torch_factory: Annotated[str, typer.Argument(help="MODULE:FUNCTION that builds torch's.")],
    flax_factory: Annotated[
        str, typer.Argument(help="MODULE:FUNCTION that builds Flax's; it may take rngs.")
    ],
    input_shape: Annotated[str, typer.Option(help="As torch has it, such as 2,3,64,64.")],
    train: Annotated[bool, typer.Option("--train", help="Compare in training mode.")] = False,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float64",
    steps: Annotated[int | None, typer.Option(min=1, help="Also train this many steps.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="For --steps, such as adamw.")] = None,
    rename: Annotated[Path | None, typer.Option(help=".json: torch's path → Flax's.")] = None,
    variant: Variant = None,
    load: Annotated[
        bool, typer.Option(help="First load torch's weights into Flax's model.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png or .svg.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Report to write, .md.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare any two models layer by layer: a PyTorch one and its port to Flax."""
    from gam_flax.parity import factories
    from gam_flax.parity.picture import check_picture

    _check_choice("--dtype", dtype, ("float64", "float32", "bfloat16"))
    if optimizer is not None and steps is None:
        raise CheckpointError("--optimizer goes with --steps")
    inputs, names = factories.random_input(input_shape), factories.read_rename(rename)
    if plot is not None:
        check_picture(plot, force=force)
    if markdown is not None:
        check_free(markdown, force=force)
    options: dict[str, Any] = {"train": train, "dtype": dtype, "rename": names}
    options |= {"steps": steps} if steps else {}
    options |= {"optimizer": optimizer} if optimizer else {}
    torch_model, flax_model = factories.build_pair(torch_factory, flax_factory)
    if load:
        flax_model, loaded = factories.load_weights(
            torch_model, flax_model, rename=names, variant=_variants(variant)
        )
        if not as_json:
            console.print(f"{len(loaded.mapped)} tensors of torch's loaded into Flax's model")
    report = factories.run(torch_model, flax_model, inputs, **options)
    print(report.to_json()) if as_json else console.print(report)
    if plot is not None:
        report.plot(plot, force=force)
    if markdown is not None:
        with whole_file(markdown, force=force) as part:
            part.write_text(report.to_markdown(), encoding="utf-8")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("gam-flax-demo"),
    force: Force = False,
) -> None:
    """Port the shipped PyTorch classifier to Flax and compare both on real images."""
    from gam_flax.demo import run_demo

    run_demo(console, out, force=force)


@app.command()
def summary(
    name: Annotated[str, typer.Argument(help="A network of list_models(), such as resnet50.")],
    attention: Annotated[str | None, typer.Option(help="A block of list_attentions().")] = None,
    stem: Annotated[
        str | None, typer.Option(help="imagenet or cifar; default: the network's own.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Default: the network's own, 1000 or YOLOv5's 80.")
    ] = None,
    side: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels of its side; default: cifar 32, YOLOv5 640, else 224."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Parameters and multiply-adds of every layer of a network, from shapes alone."""
    from gam_flax.attention.registry import list_attentions
    from gam_flax.costs import count_network
    from gam_flax.models.registry import list_models

    _check_choice("NAME", name, tuple(list_models()))
    _check_choice("--attention", attention, (None, *list_attentions()))
    _check_choice("--stem", stem, (None, "imagenet", "cifar"))
    options = {"stem": stem} if stem else {}
    try:
        counted = count_network(
            name, side=side, attention=attention, num_classes=classes, **options
        )
    except TypeError as error:
        if not stem:
            raise
        raise CheckpointError(f"--stem {stem}: {shorten(error, 200)}") from error
    except ValueError as error:
        raise CheckpointError(f"{name}: {shorten(error, 200)}") from error
    if as_json:
        print(counted.to_json())
    else:
        console.print(counted)


@app.command()
def costs(as_json: Json = False) -> None:
    """The paper's parameters and multiply-adds beside our own count."""
    from gam_flax.costs import COSTS, count, to_json, to_tables

    rows = [count(cost) for cost in COSTS]
    if as_json:
        print(to_json(rows))
    else:
        console.print(to_tables(rows))


def _decide_by_pair(
    checkpoint: Checkpoint, name: str | None, input_file: Path, output_file: Path, as_json: bool
) -> None:
    from gam_flax.parity.pair import rank_variants, settled

    blocks = _chosen(checkpoint, name)
    if len(blocks) > 1:
        names = ", ".join(shorten(b.prefix) for b in blocks[:8])
        raise CheckpointError(f"{checkpoint.path}: which block is the pair of? --block {names}")
    ranked = rank_variants(checkpoint, blocks[0], _read_npy(input_file), _read_npy(output_file))
    truth = settled(ranked)
    if as_json:
        candidates = [candidate.__dict__ for candidate in ranked]
        print(json.dumps({"variant": truth and truth.variant, "candidates": candidates}))
    else:
        table = Table("variant", "eps of the norms", "distance from the saved output")
        for candidate in ranked:
            eps = "–" if candidate.eps is None else f"{candidate.eps:g}"
            table.add_row(candidate.variant, eps, f"{candidate.distance:.2e}")
        console.print(table)
        console.print(f"It is {truth.variant}." if truth else "None of them is clearly the truth.")
    if truth is None:
        raise typer.Exit(1)


def _chosen(checkpoint: Checkpoint, name: str | None) -> list[Block]:
    """The blocks to look at: all, or the one under `name`."""
    blocks = identify(checkpoint)
    for found in blocks:
        if found.refusal and name in (None, found.prefix):
            raise CheckpointError(f"{checkpoint.path}: {found}")
    if not blocks:
        raise CheckpointError(
            f"{checkpoint.path}: no attention block found; for a whole network say --model"
        )
    if name is None:
        return blocks
    chosen = [found for found in blocks if found.prefix == name]
    if not chosen:
        names = ", ".join(shorten(found.prefix) for found in blocks[:8])
        raise CheckpointError(f"{checkpoint.path}: no block {shorten(name)!r}; it has {names}")
    return chosen


def _read_npy(path: Path) -> Any:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{shorten(path)}: not a .npy array: {shorten(error, 120)}"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise CheckpointError(f"{shorten(path)}: not one .npy array of numbers")
    return array


def _variants(words: list[str] | None) -> str | dict[str, str] | None:
    """--variant gated, or --variant gam=gated --variant se=torchvision."""
    if not words:
        return None
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    pairs = [word.partition("=") for word in words]
    for kind, equals, _ in pairs:
        if not equals or kind not in VARIANTS:
            raise CheckpointError(
                f"--variant {shorten(kind)}: with several, say kind=variant; "
                f"kinds are {', '.join(VARIANTS)}"
            )
    return {kind: name for kind, _, name in pairs}


def _check_choice(option: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        names = ", ".join(filter(None, choices))
        raise CheckpointError(f"{option} {shorten(value)}: must be one of {names}")


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    import numpy as np

    tensors = checkpoint.tensors
    floating = {k: a for k, a in tensors.items() if a.dtype.kind not in "iub"}
    return {
        "file": checkpoint.path,
        "container": checkpoint.container,
        "stripped": list(checkpoint.stripped),
        "metadata": checkpoint.metadata,
        "tensors": len(tensors),
        "values": sum(array.size for array in tensors.values()),
        "dtypes": ", ".join(sorted({array.dtype.name for array in tensors.values()})),
        "not_finite": [k for k, a in floating.items() if not np.isfinite(a).all()],
    }


def _block_json(block: Block) -> dict[str, Any]:
    return {
        "prefix": block.prefix,
        "kind": block.kind,
        "layout": block.layout,
        "variants": list(block.variants),
        "families": list(block.families),
        "refusal": block.refusal,
        **block.options,
    }


def _block_table(blocks: list[Block]) -> Table:
    table = Table("block", "kind", "stored as", "could be", "C", "r", "k", "groups", "eps")
    for block in blocks:
        if block.refusal:
            continue
        eps = block.options.get("norm_eps")
        table.add_row(
            Text(shorten(block.prefix, 40) or "(all of it)", no_wrap=True),
            block.kind.upper(),
            block.layout,
            " ".join(block.families),
            str(block.channels),
            f"{block.ratio:g}",
            str(block.kernel_size or "–"),
            str(block.groups),
            "–" if eps is None else f"{eps:g}",
        )
    return table


app.command()(train)
app.command()(detect)
app.command()(maps)
app.command()(export)


def main() -> None:
    """The entry point: a mistake of the user's is one line and status 2."""
    try:
        status = app(standalone_mode=False)
    except typer.TyperException as error:
        _stop(" ".join(error.format_message().split()))
    except CheckpointError as error:
        _stop(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _stop(f"{error.name} is not installed: pip install 'gam-attention[{extra}]'")
    else:
        sys.exit(status if isinstance(status, int) else 0)  # 130 after Ctrl-C


def _stop(line: str) -> None:
    print(f"gam-flax: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
