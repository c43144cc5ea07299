"""`gam-flax train`: the settings as options."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gam_flax.train.errors import TrainingError
from gam_flax.train.fit import fit
from gam_flax.train.joining import joined
from gam_flax.train.settings import Settings

Option = typer.Option


def train(
    data: Annotated[
        str, Option(help="fashion-mnist, mnist, cifar10, cifar100, arrays, folder, yolo.")
    ],
    out: Annotated[Path, Option(help="Folder of the run; one that stopped goes on.")],
    data_dir: Annotated[Path | None, Option(help="Where the data are.")] = None,
    model: Annotated[str, Option(help="Network, see `gam-flax summary`, or a YAML.")] = "resnet18",
    attention: Annotated[str | None, Option(help="gam, cbam, se or bam.")] = None,
    model_options: Annotated[
        str, Option(help='JSON: further arguments of the network, {"identity_start": true}.')
    ] = "{}",
    init: Annotated[Path | None, Option(help="Weights to start from, PyTorch's or ours.")] = None,
    variant: Annotated[
        str | None, Option(help="Of --init's attention, where its weights cannot tell.")
    ] = None,
    fresh: Annotated[
        list[str] | None, Option(help="Layers that --init does not fill; by default the last.")
    ] = None,
    init_step: Annotated[
        int | None, Option(help="Go on after so many of torch's steps, optimizer included.")
    ] = None,
    epochs: int = 10,
    batch_size: Annotated[int, Option(help="Of all devices together.")] = 128,
    accumulate: Annotated[int, Option(help="Parts in which a batch is computed.")] = 1,
    optimizer: Annotated[str, Option(help="sgd or adamw.")] = "sgd",
    learning_rate: Annotated[float | None, Option(help="Default: 0.1, adamw 0.001.")] = None,
    schedule: Annotated[str, Option(help="cosine, cifar, imagenet or constant.")] = "cosine",
    warmup: Annotated[float, Option(help="Epochs of a rising learning rate.")] = 0.0,
    momentum: float = 0.9,
    weight_decay: Annotated[float | None, Option(help="Default: 5e-4, adamw 0.05.")] = None,
    clip: Annotated[float | None, Option(help="Global norm of the gradient.")] = None,
    label_smoothing: float = 0.0,
    ema: Annotated[float | None, Option(help="Average the parameters, such as 0.999.")] = None,
    dtype: Annotated[str, Option(help="Of the computation: float32 or bfloat16.")] = "float32",
    remat: Annotated[bool, Option("--remat", help="Less memory, more time.")] = False,
    parameters: Annotated[str, Option(help="replicated, or sharded over devices.")] = "replicated",
    side: Annotated[int | None, Option(help="Of a folder's pictures, in pixels.")] = None,
    crop: Annotated[int | None, Option(help="Border for random crops, in pixels.")] = None,
    flip: Annotated[bool | None, Option(help="Mirror at random.")] = None,
    seed: int = 0,
    workers: Annotated[int, Option(min=0, help="Processes that read pictures.")] = 0,
    save_every: Annotated[
        int | None, Option(min=1, help="Steps between checkpoints, beside each epoch's end.")
    ] = None,
    coordinator_address: Annotated[
        str | None,
        Option(envvar="JAX_COORDINATOR_ADDRESS", help="Several hosts: HOST:PORT of process 0."),
    ] = None,
    num_processes: Annotated[
        int | None, Option(min=1, envvar="JAX_NUM_PROCESSES", help="One on each host.")
    ] = None,
    process_id: Annotated[
        int | None, Option(min=0, envvar="JAX_PROCESS_ID", help="Of this host, from 0.")
    ] = None,
    distributed: Annotated[
        bool, Option("--distributed", help="Several hosts, as Slurm, Open MPI or the TPU says.")
    ] = False,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Also write for it.")] = False,
    force: Annotated[bool, Option("--force", help="Take away the run that is there.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Train a network with attention; stopped or killed, the same call goes on."""
    settings = Settings(
        data=data,
        data_dir=None if data_dir is None else str(data_dir),
        side=side,
        model=model,
        attention=attention,
        model_options=_options(model_options),
        dtype=dtype,
        remat=remat,
        init=None if init is None else str(init),
        variant=variant,
        fresh=None if fresh is None else tuple(fresh),
        init_step=init_step,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        seed=seed,
        crop=crop,
        flip=flip,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        momentum=momentum,
        weight_decay=weight_decay,
        clip=clip,
        label_smoothing=label_smoothing,
        ema=ema,
        parameters=parameters,
    )
    console = Console(soft_wrap=True, stderr=as_json)
    place = (coordinator_address, num_processes, process_id)
    alone = place == (None, None, None) and not distributed
    with nullcontext(True) if alone else joined(*place) as first:
        result = fit(
            settings,
            out,
            workers=workers,
            save_every=save_every,
            tensorboard=tensorboard,
            force=force,
            console=console,
        )
    if as_json and first:
        print(json.dumps(asdict(result)))
    if not result.finished:
        raise typer.Exit(130)


def _options(text: str) -> dict:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise TrainingError(f"model-options: not JSON: {error}") from error
    if not isinstance(options, dict):
        raise TrainingError("model-options: expected a JSON object")
    return options
