"""The command line `captioner`.

A command is a function of one configuration, whose dataclass defines the options and the help; it
returns an `Output`. Other packages add commands through the entry-point group `captioner.commands`,
as the pipelines do. Exit codes are those of `exits`.
"""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import tyro

from model_lib.batch.config import BatchConfig
from model_lib.errors import UserError, exit_code, printable
from model_lib.evaluate.config import EvaluateConfig, ScoreConfig, TuneConfig
from model_lib.exits import MISTAKE, exit_in_one_line
from model_lib.ingest.config import IngestConfig, ScenesConfig
from model_lib.ingest.download import DownloadConfig
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.model.config import DecodeConfig
from model_lib.options import CaptionPrecision, StageConfig, option, require
from model_lib.presets import PRESETS
from model_lib.registry.config import ExportConfig, ModelsConfig, RegisterConfig, RollbackConfig
from model_lib.registry.model_uris import CHAMPION_URI
from model_lib.serve.config import ServeConfig
from model_lib.steps.doctor import DoctorConfig
from model_lib.tracking.server import require_mlflow, tracking_from_environment
from model_lib.train.config import TrainConfig

if TYPE_CHECKING:
    from model_lib.evaluate.result import Evaluation
    from model_lib.model.captioning import Caption

PACKAGES = ["captioner", "torch", "transformers", "pyarrow", "pillow", "fsspec", "numpy"]
PACKAGES += ["mlflow", "kfp"]
"""Packages whose versions `info` shows."""


@dataclass
class Output:
    """The result of a command, as JSON and as lines of text.

    Lines may be made while they are printed; document and exit code are complete after the last.
    """

    document: Any
    lines: Iterable[str]
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class InfoConfig(StageConfig):
    """Show the packages' versions, and each preset's parameter counts (from shapes alone, without
    weights)."""

    preset: str | None = None
    """Count this preset only."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(f"preset {self.preset!r}: unknown; one of {', '.join(PRESETS)}")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(StageConfig):
    """Caption images, one line each as it is ready."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-f"])]
    """Images: paths, URIs, http(s) addresses, folders, patterns such as "photos/*.jpg"; - takes a
    list from stdin."""
    model: str = CHAMPION_URI
    """A folder, hub name, URI or model of the MLflow registry; or hf: before a hub name, folder or
    URI of a captioner of transformers."""
    decode: DecodeConfig = DecodeConfig()
    """How captions are decoded."""
    prompt: str | None = None
    """Text beside the image, for a model hf:…: a chat model's instruction, or the beginning that
    BLIP, BLIP-2 and GIT continue."""
    explain: str | None = None
    """HTML file that shows the model's attention for each word."""
    batch_size: int = option(16, minimum=1)
    """Images decoded together."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: CaptionPrecision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""


@dataclass(frozen=True, kw_only=True)
class AppConfig(StageConfig):
    """Show a web page to caption images and see where the model looks."""

    model: str = CHAMPION_URI
    """A folder, hub name, URI or model of the MLflow registry; or hf: before a hub name, folder or
    URI of a captioner of transformers."""
    decode: DecodeConfig = DecodeConfig(num_beams=5)
    """How captions are decoded; the page can change the commonest options."""
    prompt: str | None = None
    """Text beside the image, for a model hf:…: a chat model's instruction, or the beginning that
    BLIP, BLIP-2 and GIT continue."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0: whoever reaches this machine may use the page."""
    port: int = option(7860, minimum=0)
    """Port; 0: a free one."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: CaptionPrecision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.port < 2**16, f"port: {self.port} is not at most {2**16 - 1}")


@dataclass(frozen=True, kw_only=True)
class AverageConfig(StageConfig):
    """Make one model of several: the mean of their weights."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Trained captioners of one kind: folders, hub names, URIs or models:/captioner@champion."""
    output: str
    """Folder or URI for the model."""
    name: str = "average"
    """Its name in evaluations and MLflow."""


def info(config: InfoConfig) -> Output:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    counts, lines = [], []
    if "torch" in versions:  # the image of a stage without a model has none
        counts = [_count_parameters(p) for p in ([config.preset] if config.preset else PRESETS)]
        lines = [f"{'preset':<24} {'total':>13} {'trainable':>13}"]
        lines += [f"{c['preset']:<24} {c['total']:>13,} {c['trainable']:>13,}" for c in counts]
        lines += [""]
    elif config.preset:
        remedy = "to count its parameters, install torch: pip install 'captioner[model]'"
        raise UserError(f"preset {config.preset}: {remedy}")
    lines += [f"{name:<24} {value}" for name, value in versions.items()]
    environment = {"versions": versions, "cpus": cpu_count()}
    return Output({**(counts[0] if config.preset else {"presets": counts}), **environment}, lines)


def doctor(config: DoctorConfig) -> Output:
    from model_lib.steps.doctor import doctor as run
    from model_lib.steps.doctor import table

    findings = run(config)
    rows = [{"check": name, **asdict(finding)} for name, finding in findings.items()]
    has_failed = any(finding.state == "failed" for finding in findings.values())
    return Output(rows, table(findings), exit_code=int(has_failed))


def _count_parameters(preset: str) -> dict[str, Any]:
    import torch

    from model_lib.model.captioner import Captioner, CaptionerConfig

    with torch.device("meta"):
        model = Captioner(CaptionerConfig.from_preset(PRESETS[preset]))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, is_trainable in sizes if is_trainable)
    return {"preset": preset, "total": sum(size for size, _ in sizes), "trainable": trainable}


def scenes(config: ScenesConfig) -> Output:
    from model_lib.ingest.scenes import make_scenes

    make_scenes(config)
    line = f"{config.train} training and {config.val} validation images in {config.output}"
    return Output(asdict(config), [line])


def download(config: DownloadConfig) -> Output:
    from model_lib.ingest.download import download as run

    archives = run(config)
    if config.dataset == "spice":
        from model_lib.scores.spice import unpack_models

        for archive in archives:
            unpack_models(archive.uri, config.output)
    lines = [f"{a.uri}: {a.bytes / 1e9:.2f} GB, {a.files:,} files" for a in archives]
    return Output([asdict(archive) for archive in archives], lines)


def ingest(config: IngestConfig) -> Output:
    from model_lib.ingest.ingesting import ingest as run

    manifest = run(config)
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest.counts.items())
    lines = [f"{config.output}: images: {counts}; fingerprint {manifest.fingerprint[:12]}"]
    if manifest.quarantined:
        rejected = ", ".join(f"{reason} {n:,}" for reason, n in manifest.quarantined.items())
        lines += [f"not used: {rejected}: {storage.join(config.output, 'quarantine.parquet')}"]
    return Output(manifest.to_dict(), lines)


def train(config: TrainConfig) -> Output:
    from model_lib.train.launch import train_here

    trained = train_here(config, tracking_from_environment())
    scores = f"validation CIDEr {trained.validation_cider:.3f}, loss {trained.validation_loss:.4f}"
    return Output(asdict(trained), [f"{trained.model}: {scores}"])


def average(config: AverageConfig) -> Output:
    from model_lib.train.averaging import average as run

    for model in config.models:
        _find_registry(model)
    sources = run(config.models, config.output, config.name)
    line = f"{config.output}: the mean of {len(sources)} models"
    return Output({"model": config.output, "averaged": sources}, [line])


def evaluate(config: EvaluateConfig) -> Output:
    from model_lib.evaluate.evaluation import evaluate as run

    return _scores(run(config, tracking_from_environment()))


def tune(config: TuneConfig) -> Output:
    from model_lib.evaluate.tuning import tune as run

    rows = run(config, tracking_from_environment())
    columns = list(rows[0])
    lines = ["  ".join(f"{name:>{max(len(name), 8)}}" for name in columns)]
    for row in rows:
        lines.append("  ".join(f"{row[name]:>{max(len(name), 8)}.4g}" for name in columns))
    names = ("num_beams", "length_penalty", "no_repeat_ngram_size")
    best = " ".join(f"--{name} {rows[0][name]:g}" for name in names)
    return Output(rows, [*lines, f"for evaluate, caption and batch: {best}"])


def score(config: ScoreConfig) -> Output:
    from model_lib.evaluate.scoring import score as run

    return _scores(run(config))


def _scores(evaluation: "Evaluation") -> Output:
    images = f"{evaluation.images:,} images of {evaluation.split}"
    lines = [f"{images}; in brackets, 95 % intervals over images"]
    for name, value in evaluation.scores.items():
        low, high = evaluation.intervals[name]
        lines.append(f"{name:<16} {value:.4f} [{low:.4f}, {high:.4f}]")
    lines.append(f"{'CIDEr, shuffled':<16} {evaluation.shuffled_cider:.4f}")
    lines += [f"{name:<16} {value:,.4g}" for name, value in evaluation.diversity.items()]
    lines.append(f"n-grams' frequencies are from {evaluation.frequencies}")
    return Output(evaluation.to_dict(), lines)


def register(config: RegisterConfig) -> Output:
    from model_lib.registry.registry import register as run

    tracking = require_mlflow(tracking_from_environment())
    tracking.require_answer()  # at a prompt, fail at once; a step of a pipeline waits
    registered = run(config, tracking)
    version = f"version {registered.version} ({registered.winner})"
    return Output(registered.to_dict(), [f"{version} {registered.outcome}: {registered.reason}"])


def models(config: ModelsConfig) -> Output:
    from model_lib.registry.model_uris import MODEL
    from model_lib.registry.versions import list_versions, versions_table

    tracking = require_mlflow(tracking_from_environment())
    versions = list_versions(tracking)
    lines = versions_table(versions)
    if not versions:
        registry = f"the model registry at {tracking.uri}"
        lines = [f"no versions of {MODEL} in {registry}; captioner register makes one"]
    return Output([asdict(version) for version in versions], lines)


def rollback(config: RollbackConfig) -> Output:
    from model_lib.registry.versions import rollback as run

    result = run(tracking_from_environment())
    champion = f"version {result['champion']} is the champion again"
    return Output(result, [f"{champion}; version {result['rolled_back']} was rolled back"])


def export(config: ExportConfig) -> Output:
    from model_lib.registry.export import export as run

    _find_registry(config.model)
    exported = run(config)
    lines = [
        f"{target}: loads with transformers' AutoModel, as its README.md says"
        for target in (exported["output"], exported["repository"])
        if target
    ]
    if exported["scores"] is None:
        lines.append("the card has no scores; --evaluation names what evaluate wrote for the model")
    return Output(exported, lines)


def caption(config: CaptionConfig) -> Output:
    from model_lib.io.images import ImageError
    from model_lib.model.captioner import Captioner
    from model_lib.model.captioning import caption_each, find_images
    from model_lib.model.rivals import load_captioner

    _find_registry(config.model)
    if config.explain is not None:
        storage.require_writable(config.explain.rpartition("/")[0] or ".")
    model = load_captioner(config.model, config.device, config.precision, config.prompt)
    if config.explain is not None and not isinstance(model, Captioner):
        raise UserError(f"explain: {config.model} is another project's, and shows no attention")
    output = Output([], [])

    def lines() -> Iterator[str]:
        captioned: list[tuple[str, Caption]] = []
        failed = 0
        files, images = itertools.tee(find_images(config.files, sys.stdin))
        results = caption_each(model, images, config.decode, config.batch_size)
        for file, result in zip(files, results, strict=True):
            if isinstance(result, list):
                captioned.append((str(file), result[0]))
                for caption in result:
                    row = {"uri": file, "caption": caption.text, "score": caption.score}
                    output.document.append(row)
                    yield f"{file}: {caption.text}"
                continue
            failed += 1
            problem = f"{file}: {result}" if isinstance(result, ImageError) else str(result)
            output.document.append({"uri": str(file), "error": problem})
            output.exit_code = max(output.exit_code, exit_code(result))
            print(printable(f"{MISTAKE}{problem}"), file=sys.stderr)
        count = failed + len(captioned)
        if failed and count > 1:
            print(f"captioner: {failed} of {count} images without a caption", file=sys.stderr)
        if config.explain is not None:
            from model_lib.evaluate.explain import render_explanation

            assert isinstance(model, Captioner)
            storage.write_bytes(config.explain, render_explanation(model, captioned).encode())

    output.lines = lines()
    return output


def app(config: AppConfig) -> Output:
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError(name="gradio")  # now, not once the model is loaded
    from model_lib.app.server import address, listen, page_server
    from model_lib.model.rivals import load_captioner

    _find_registry(config.model)
    listener = listen(config.host, config.port)
    model = load_captioner(config.model, config.device, config.precision, config.prompt)

    def lines() -> Iterator[str]:
        with page_server(model, config.model, config.decode) as server:
            yield f"{address(listener)} (Ctrl-C ends it)"
            server.run(sockets=[listener])

    return Output({"address": address(listener)}, lines())


def batch(config: BatchConfig) -> Output:
    from model_lib.batch.batching import batch as run
    from model_lib.batch.merging import notes

    _find_registry(config.model)
    summary = run(config)
    line = f"{summary.captions}: {summary.ok:,} of {summary.images:,} images captioned"
    if summary.errors:
        errors = ", ".join(f"{reason} {count}" for reason, count in summary.errors.items())
        line = f"{line}; errors: {errors}"
    lines = [line, *summary.files, *notes(summary), summary.report]
    return Output(asdict(summary), lines)


def serve(config: ServeConfig) -> Output:
    from model_lib.serve.server import serve as run

    _find_registry(config.model)
    run(config)
    return Output({}, [])


def _find_registry(source: str) -> None:
    """Let `models:/…` be looked up where the environment says, or in the embedded store."""
    if source.startswith("models:/"):
        require_mlflow(tracking_from_environment())


COMMANDS: dict[str, Callable[[Any], Output]] = {
    "scenes": scenes,
    "download": download,
    "ingest": ingest,
    "train": train,
    "average": average,
    "evaluate": evaluate,
    "tune": tune,
    "score": score,
    "register": register,
    "models": models,
    "rollback": rollback,
    "export": export,
    "caption": caption,
    "app": app,
    "batch": batch,
    "serve": serve,
    "info": info,
    "doctor": doctor,
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else a test's
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="captioner: %(message)s", level=logging.WARNING)
    # Bucket drivers leave connections open at exit.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with exit_in_one_line():
        sys.exit(_run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    # A container image may have the library without the pipelines.
    entries = importlib.metadata.entry_points(group="captioner.commands")
    others = {e.name: e for e in entries if importlib.util.find_spec(e.module.partition(".")[0])}
    names = sorted({*COMMANDS, *others})
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview({name: COMMANDS.get(name) or others[name].load() for name in names}))
        return 0 if argv else 2
    name, *options = argv
    if name not in names:
        raise UserError(f"unknown command {name!r}; one of {', '.join(names)}")
    if name in others and importlib.util.find_spec("kfp") is None:
        remedy = "pip install 'captioner[pipelines]'"
        raise UserError(f"{name}: needs kfp, which is not installed: {remedy}")
    function = COMMANDS.get(name) or others[name].load()
    wants_json = "--json" in options
    output = function(parse(function, name, [option for option in options if option != "--json"]))
    for line in output.lines:
        if not wants_json:
            print(printable(line), flush=True)
    if wants_json:
        text = json.dumps(output.document, indent=2, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding)
        except UnicodeEncodeError:  # of the terminal, or a file's name that is no text
            text = json.dumps(output.document, indent=2)
        print(text)
    return output.exit_code


def config_class(function: Callable[[Any], Output]) -> type:
    """Return the configuration that a command takes."""
    (parameter,) = inspect.signature(function).parameters
    return get_type_hints(function)[parameter]


def parse(function: Callable[[Any], Output], name: str, options: list[str]) -> Any:
    """Return the command's configuration from options; `UserError` in one line instead of tyro's
    framed box."""
    config = config_class(function)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                config,
                args=options,
                prog=f"captioner {name}",
                description=f"{inspect.getdoc(config)}\n\n--json prints one JSON document.",
                config=(tyro.conf.OmitArgPrefixes,),  # --num_beams, not --decode.num_beams
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = _first_message(errors.getvalue())
        raise UserError(f"{message} (see captioner {name} --help)") from None


def _first_message(box: str) -> str:
    """Return the message in tyro's framed error, from its title to its first ruler, as one line.

    Where stdout is not UTF-8, the frame is spaces, and a ruler is under the title, too.
    """
    message: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        row = line.strip("│ ")
        is_ruler = set(row) <= set("─-")
        if is_ruler and message:
            break
        if not is_ruler and not row.startswith("╰"):
            message.append(row)
    return " ".join(" ".join(message).split()) or "bad usage"


def _overview(commands: dict[str, Callable[[Any], Output]]) -> str:
    lines = ["captioner: train, evaluate, register and run an image captioner", ""]
    for name, function in commands.items():
        summary = (inspect.getdoc(config_class(function)) or "").splitlines()[0]
        lines.append(f"  {name:<10} {summary}")
    return "\n".join([*lines, "", "captioner COMMAND --help explains a command's options."])
