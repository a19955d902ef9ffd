"""The command line `captioner`.

A command is a function of one configuration, whose dataclass makes its options and help, that
returns an `Output`. Other packages add commands through the entry-point group `captioner.commands`,
as the pipelines do.

Exit codes are those of `exits`.
"""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import tyro

from model_lib.batch.config import BatchConfig
from model_lib.errors import UserError, printable
from model_lib.evaluate.config import EvaluateConfig
from model_lib.exits import exit_in_one_line
from model_lib.ingest.config import DownloadConfig, IngestConfig, ScenesConfig
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.model.config import DecodeConfig
from model_lib.options import Precision, StageConfig, option
from model_lib.presets import PRESETS
from model_lib.registry.config import ModelsConfig, RegisterConfig, RollbackConfig
from model_lib.tracking.model_uris import CHAMPION_URI
from model_lib.train.config import TrainConfig

if TYPE_CHECKING:
    from model_lib.model.captioning import Caption


@dataclass
class Output:
    """What a command has to say, as JSON and as lines for people.

    Lines may be made while they are printed; document and exit code are complete after the last.
    """

    document: Any
    lines: Iterable[str]
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class InfoConfig(StageConfig):
    """Show the environment, and each preset's parameter counts (from shapes alone, without
    weights)."""

    preset: str | None = None
    """Count this preset only."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(f"preset {self.preset!r}: unknown; one of {', '.join(PRESETS)}")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(DecodeConfig):
    """Caption images, one line each as it is ready."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-f"])]
    """Images: paths, URIs, http(s) addresses, folders, patterns such as "photos/*.jpg"; - takes a
    list from stdin."""
    model: str = CHAMPION_URI
    """A folder, hub name, URI or model of the MLflow registry."""
    explain: str | None = None
    """HTML file that shows where the model looked for each word."""
    batch_size: int = option(16, minimum=1)
    """Images decoded together."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Precision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""


def info(config: InfoConfig) -> Output:
    import platform
    import shutil

    def count(preset: str) -> dict[str, Any]:
        import torch

        from model_lib.model.captioner import Captioner, CaptionerConfig

        with torch.device("meta"):
            model = Captioner(CaptionerConfig.from_preset(PRESETS[preset]))
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trainable = sum(size for size, trained in sizes if trained)
        return {"preset": preset, "total": sum(size for size, _ in sizes), "trainable": trainable}

    packages = (
        "captioner",
        "torch",
        "transformers",
        "pyarrow",
        "pillow",
        "fsspec",
        "numpy",
        "mlflow",
        "kfp",
    )
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus, counts = [], []
    if "torch" in versions:  # a stage without a model has none
        import torch

        gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        counts = [count(preset) for preset in ([config.preset] if config.preset else PRESETS)]
    elif config.preset:
        raise UserError(
            f"preset {config.preset}: to count its parameters, install torch: pip install "
            "'captioner[model]'"
        )
    environment = {
        "versions": versions,
        "gpus": gpus,
        "cpus": cpu_count(),
        "java": shutil.which("java") is not None,
    }
    lines = [f"{'preset':<20} {'total':>13} {'trainable':>13}"] if counts else []
    lines += [f"{row['preset']:<20} {row['total']:>13,} {row['trainable']:>13,}" for row in counts]
    lines += [
        *([""] if counts else []),
        *(f"{name:<20} {version}" for name, version in versions.items()),
    ]
    lines += [
        f"{'GPUs':<20} {', '.join(gpus) or 'none'}",
        f"{'Java':<20} {'yes' if environment['java'] else 'no'}",
    ]
    document = {**counts[0], **environment} if config.preset else {"presets": counts, **environment}
    return Output(document, lines)


def scenes(config: ScenesConfig) -> Output:
    from model_lib.ingest.scenes import make_scenes

    make_scenes(config)
    line = f"{config.train} training and {config.val} validation images in {config.output}"
    return Output(asdict(config), [line])


def download(config: DownloadConfig) -> Output:
    from model_lib.ingest.download import download as run
    from model_lib.scores.spice import unpack_models

    archives = run(config)
    if config.dataset == "spice":
        for archive in archives:
            unpack_models(archive.uri, config.output)
    lines = [
        f"{archive.uri}: {archive.bytes / 1e9:.2f} GB, {archive.files:,} files"
        for archive in archives
    ]
    return Output([asdict(archive) for archive in archives], lines)


def ingest(config: IngestConfig) -> Output:
    from model_lib.ingest.ingesting import ingest as run

    manifest = run(config)
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest.counts.items())
    left_out = (
        ", ".join(f"{reason} {count}" for reason, count in manifest.quarantined.items()) or "none"
    )
    text = (
        f"{config.output}: images: {counts}; quarantined: {left_out}; fingerprint "
        f"{manifest.fingerprint[:12]}"
    )
    return Output(manifest.to_dict(), [text])


def train(config: TrainConfig) -> Output:
    from model_lib.tracking.server import tracking_from_environment
    from model_lib.train.launch import train_here

    trained = train_here(config, tracking_from_environment())
    scores = f"validation CIDEr {trained.validation_cider:.3f}, loss {trained.validation_loss:.4f}"
    return Output(asdict(trained), [f"{trained.model}: {scores}"])


def evaluate(config: EvaluateConfig) -> Output:
    from model_lib.evaluate.evaluation import evaluate as run
    from model_lib.tracking.server import NO_TRACKING, tracking_from_environment

    tracking = NO_TRACKING if config.model is None else tracking_from_environment()
    evaluation = run(config, tracking)
    lines = [
        (
            f"{evaluation.images:,} images of {evaluation.split}; in brackets, 95 % intervals over "
            "images"
        )
    ]
    for name, value in evaluation.scores.items():
        low, high = evaluation.intervals[name]
        lines.append(f"{name:<16} {value:.4f} [{low:.4f}, {high:.4f}]")
    lines += [f"{'CIDEr, shuffled':<16} {evaluation.shuffled_cider:.4f}"]
    lines += [f"{name:<16} {value:,.4g}" for name, value in evaluation.diversity.items()]
    lines.append(f"n-grams' frequencies are from {evaluation.frequencies}")
    return Output(evaluation.to_dict(), lines)


def register(config: RegisterConfig) -> Output:
    from model_lib.registry.registry import register as run
    from model_lib.tracking.server import require_mlflow, tracking_from_environment

    tracking = require_mlflow(tracking_from_environment())
    tracking.require_answer()  # who waits at a prompt is told at once; a step of a pipeline waits
    registered = run(config, tracking)
    line = (
        f"version {registered.version} ({registered.winner}) {registered.fate}: {registered.reason}"
    )
    return Output(registered.to_dict(), [line])


def models(config: ModelsConfig) -> Output:
    from model_lib.registry.versions import list_versions, versions_table
    from model_lib.tracking.model_uris import MODEL
    from model_lib.tracking.server import require_mlflow, tracking_from_environment

    tracking = require_mlflow(tracking_from_environment())
    found = list_versions(tracking)
    none = (
        f"no versions of {MODEL} in the model registry at {tracking.uri}; captioner register "
        "makes one"
    )
    return Output(
        [asdict(version) for version in found], versions_table(found) if found else [none]
    )


def rollback(config: RollbackConfig) -> Output:
    from model_lib.registry.versions import rollback as run
    from model_lib.tracking.server import tracking_from_environment

    made = run(tracking_from_environment())
    line = (
        f"version {made.champion} is the champion again; version {made.rolled_back} was rolled back"
    )
    return Output(asdict(made), [line])


def caption(config: CaptionConfig) -> Output:
    from model_lib.io.images import ImageError
    from model_lib.model.captioner import Captioner
    from model_lib.model.captioning import caption_each, find_images

    _find_registry(config.model)
    if config.explain is not None:
        storage.require_writable(config.explain.rpartition("/")[0] or ".")
    model = Captioner.from_pretrained(
        config.model, device=config.device, precision=config.precision
    )
    output = Output([], [])

    def lines() -> Iterator[str]:
        explained: list[tuple[str, Caption]] = []
        named, captioned = itertools.tee(find_images(config.files, sys.stdin))
        results = caption_each(model, captioned, config, config.batch_size)
        failed = count = 0
        for file, result in zip(named, results, strict=True):
            count += 1
            if isinstance(result, list):
                for one in result:
                    output.document.append({"uri": file, "caption": one.text, "score": one.score})
                    yield f"{file}: {one.text}"
                explained.append((str(file), result[0]))
                continue
            problem = f"{file}: {result}" if isinstance(result, ImageError) else str(result)
            output.document.append({"uri": str(file), "error": problem})
            output.exit_code = max(output.exit_code, 2 if isinstance(result, UserError) else 1)
            failed += 1
            print(printable(f"captioner: error: {problem}"), file=sys.stderr)
        if failed and count > 1:
            print(f"captioner: {failed} of {count} images without a caption", file=sys.stderr)
        if config.explain is not None:
            from model_lib.model.explain import render_explanation

            storage.write_bytes(config.explain, render_explanation(model, explained).encode())

    output.lines = lines()
    return output


def batch(config: BatchConfig) -> Output:
    from model_lib.batch.batching import batch as run

    _find_registry(config.model)
    summary = run(config)
    errors = ", ".join(f"{reason} {count}" for reason, count in summary.errors.items())
    text = f"{summary.captions}: {summary.ok:,} of {summary.images:,} images captioned"
    return Output(
        asdict(summary), [text + (f"; errors: {errors}" if errors else ""), summary.report]
    )


def _find_registry(source: str) -> None:
    """Let `models:/…` be looked up where the environment says, or in the embedded store."""
    if source.startswith("models:/"):
        from model_lib.tracking.server import require_mlflow, tracking_from_environment

        require_mlflow(tracking_from_environment())


COMMANDS: dict[str, Callable[[Any], Output]] = {
    "scenes": scenes,
    "download": download,
    "ingest": ingest,
    "train": train,
    "evaluate": evaluate,
    "register": register,
    "models": models,
    "rollback": rollback,
    "caption": caption,
    "batch": batch,
    "info": info,
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else a test's
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="captioner: %(message)s", level=logging.WARNING)
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # what bucket drivers leave unfinished at exit
    with exit_in_one_line():
        sys.exit(_run(argv))


def _run(argv: list[str]) -> int:
    elsewhere = {
        entry.name: entry
        for entry in importlib.metadata.entry_points(group="captioner.commands")
        if importlib.util.find_spec(
            entry.module.partition(".")[0]
        )  # a container has the library alone
    }
    names = sorted({*COMMANDS, *elsewhere})
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview({name: COMMANDS.get(name) or elsewhere[name].load() for name in names}))
        return 0 if argv else 2
    name, *options = argv
    if name not in names:
        raise UserError(f"unknown command {name!r}; one of {', '.join(names)}")
    if name in elsewhere and importlib.util.find_spec("kfp") is None:
        raise UserError(
            f"{name}: needs kfp, which is not installed: pip install 'captioner[pipelines]'"
        )
    function = COMMANDS.get(name) or elsewhere[name].load()
    wants_json = "--json" in options
    output = function(parse(function, name, [option for option in options if option != "--json"]))
    for line in output.lines:
        if not wants_json:
            print(printable(line), flush=True)
    if wants_json:
        print(_json(output.document))
    return output.exit_code


def _json(document: Any) -> str:
    """Return a document as it can be printed: names of files may be no text, and a terminal may
    know few letters."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return json.dumps(document, indent=2)
    return text


def config_class(function: Callable[[Any], Output]) -> type:
    """Return the configuration that a command takes."""
    (parameter,) = inspect.signature(function).parameters
    return get_type_hints(function)[parameter]


def parse(function: Callable[[Any], Output], name: str, options: list[str]) -> Any:
    """Make the command's configuration from options; `UserError` in one line instead of tyro's
    framed box."""
    config = config_class(function)
    description = f"{inspect.getdoc(config)}\n\n--json prints one JSON document instead of text."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, args=options, prog=f"captioner {name}", description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_first_row(said.getvalue())} (see captioner {name} --help)") from None


def _first_row(box: str) -> str:
    """Return the message in tyro's framed error, up to its first ruler, as one line."""
    rows = [row.strip("│ ") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    message: list[str] = []
    for row in rows:
        if row.startswith(("╭", "╰")):
            continue
        if row and set(row) <= set("─-"):
            break
        message.append(row)
    return " ".join(" ".join(message).split()) or "bad usage"


def _overview(commands: dict[str, Callable[[Any], Output]]) -> str:
    lines = ["captioner: train, evaluate, register and run an image captioner", ""]
    for name, function in commands.items():
        lines.append(
            f"  {name:<10} {(inspect.getdoc(config_class(function)) or '').splitlines()[0]}"
        )
    return "\n".join([*lines, "", "captioner COMMAND --help explains a command's options."])
