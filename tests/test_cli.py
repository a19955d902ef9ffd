"""The command line: its output and its errors, each in a fresh process."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from model_lib import Captioner

Run = Callable[..., CompletedProcess]
EVERY = ["run", "scenes", "download", "ingest", "train", "average", "evaluate", "tune", "score"]
EVERY += ["register", "models", "rollback", "caption", "batch", "compile", "submit", "schedule"]
EVERY += ["export", "app", "info", "doctor"]


def refused(done: CompletedProcess, *words: str) -> None:
    """Check for exit code 2 and one line on stderr with these words."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("captioner: error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_info_counts_the_parameters(captioner: Run) -> None:
    done = captioner("info", "--preset", "clip-l-gpt2-medium", "--json")
    document = json.loads(done.stdout)
    assert document["total"] == 810326016 and document["trainable"] == 353823744
    assert done.returncode == 0 and done.stderr == ""


def test_every_command_is_listed_and_explains_itself(captioner: Run) -> None:
    overview = captioner("--help")
    assert overview.returncode == 0
    for command in EVERY:
        assert f"\n  {command} " in overview.stdout
        page = captioner(command, "--help")
        assert page.returncode == 0
        assert f"usage: captioner {command}" in page.stdout and "--json" in page.stdout


def test_an_image_is_captioned_as_from_python(
    captioner: Run, saved_model: Path, scenes: Path
) -> None:
    """The other stages, one after another, are in test_documents.py."""
    image = scenes / "val2017" / "000000000001.jpg"
    options = ("--model", saved_model, "--num_beams", "2", "--max_new_tokens", "5")
    done = captioner("caption", "-f", image, image, *options)
    model = Captioner.from_pretrained(str(saved_model))
    expected = model.caption([str(image)], num_beams=2, max_new_tokens=5)
    assert done.stdout.splitlines() == [f"{image}: {expected[0].text}"] * 2


def test_sampling_is_reproduced_by_its_seed(
    captioner: Run, saved_model: Path, scenes: Path
) -> None:
    image = scenes / "val2017" / "000000000001.jpg"
    options = ("-f", image, "--model", saved_model, "--top_p", "0.9", "--json")
    first, same, other = (captioner("caption", *options, "--seed", seed) for seed in (1, 1, 2))
    assert first.returncode == 0 and first.stdout == same.stdout != other.stdout


def test_a_broken_image_does_not_keep_the_others_from_their_captions(
    captioner: Run, saved_model: Path, scenes: Path, odd_images: Path
) -> None:
    good, broken = scenes / "val2017" / "000000000001.jpg", odd_images / "broken.png"
    done = captioner("caption", "-f", good, broken, good, "--model", saved_model)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    assert f"{broken}: unreadable" in done.stderr
    assert "1 of 3 images without a caption" in done.stderr
    done = captioner("caption", "-f", good, "gone.jpg", "--model", saved_model)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1
    assert "gone.jpg: no such file" in done.stderr


def test_folders_patterns_lists_and_several_captions(
    captioner: Run, saved_model: Path, scenes: Path
) -> None:
    folder = scenes / "val2017"
    options = ("--model", saved_model, "--max_new_tokens", "4")
    whole = captioner("caption", "-f", folder, *options)
    assert whole.returncode == 0 and whole.stderr == "" and len(whole.stdout.splitlines()) == 12
    # Brackets are no pattern: they occur in names.
    some = captioner("caption", "-f", folder / "0000000000[0-1]1.jpg", *options)
    assert some.returncode == 2 and "no such file" in some.stderr
    options += ("--num_captions", "3", "--temperature", "1")
    some = captioner("caption", "-f", folder / "*01?.jpg", *options)
    count = len(list(folder.glob("*01?.jpg")))
    assert some.returncode == 0 and len(some.stdout.splitlines()) == 3 * count
    listed = "\n".join(str(file) for file in sorted(folder.iterdir())[:2])
    piped = captioner("caption", "-f", "-", "--model", saved_model, "--json", stdin=listed)
    assert [row["uri"] for row in json.loads(piped.stdout)] == listed.splitlines()


def test_every_odd_image_gets_a_caption_or_one_clear_error(
    captioner: Run, saved_model: Path, odd_images: Path
) -> None:
    done = captioner("caption", "-f", odd_images, "--model", saved_model, "--max_new_tokens", "4")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 20
    errors = [line for line in done.stderr.splitlines() if line.startswith("captioner: error: ")]
    assert len(errors) == 6 and "captioner: 6 of 26 images without a caption" in done.stderr
    assert len(done.stderr.splitlines()) == 7


def test_explain_draws_the_attention(
    captioner: Run, saved_model: Path, scenes: Path, tmp_path: Path
) -> None:
    image = scenes / "val2017" / "000000000001.jpg"
    done = captioner("caption", "-f", image, "--model", saved_model, "--explain", "out.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.html").read_text()
    assert page.count("<figure>") >= 1 and str(image) in page
    options = ("--model", saved_model, "--explain", "/proc/x/out.html")
    refused(captioner("caption", "-f", image, *options), "/proc/x")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("frobnicate", ["frobnicate", "one of"]),
        ("train --data x", ["--output"]),
        ("train --data x --output y --learning_rate fast", ["learning-rate", "fast"]),
        ("train --data x --output y --colour red", ["--colour"]),
        ("train --data gone --output y --preset tiny", ["gone", "captioner ingest"]),
        ("info --preset huge", ["huge"]),
        ("ingest --annotations gone.json --images . --output o", ["gone.json: not there"]),
        ("ingest --dataset gone --output o", ["gone: not there"]),
        ("ingest --dataset nowhere://x --output o", ["nowhere"]),
        ("run --dataset gone", ["gone: not there"]),
        ('run --candidates \'[{{"seed": 1}}, {{"seed": 2}}]\'', ["a name of its own"]),
        ("run --preset huge", ["huge"]),
        ("run --workdir gs://b/work", ["gs://b/work: is not a folder of this machine"]),
        ("compile --output /proc/x", ["/proc/x", "written"]),
        ("batch --images {scenes} --output '' --model {model}", ["output: is empty"]),
        ("caption -f a.jpg --model {model}", ["a.jpg: no such file"]),
        ("caption -f a.jpg --model {model} --batch_size 0", ["batch_size: 0"]),
        ("score --results gone.json --annotations gone.json", ["gone.json"]),
        ("evaluate --model m", ["--data"]),
        ("score --results r --annotations a --images i", ["CLIPScore needs both", "--clip"]),
        ("register --evaluations gone", ["gone/scores.json"]),
        ("caption -f a.jpg --model ./gone", ["./gone: no such folder"]),
        ("caption -f a.jpg --model {scenes}", ["{scenes}: not a captioner"]),
        ("caption -f a.jpg", ["models:/captioner@champion", "register a model first"]),
        ("caption -f a.jpg --model m --top_p 7", ["top_p: 7"]),
        ("caption -f a.jpg --model {model} --device abacus", ["device abacus"]),
        ("batch --images gone --output o --model {model}", ["gone: no such folder"]),
        ("batch --images {scenes} --output /proc/x --model {model}", ["/proc/x", "written"]),
    ],
)
def test_bad_usage_and_input_is_one_line(
    captioner: Run, scenes: Path, saved_model: Path, command: str, words: list[str]
) -> None:
    names = {"scenes": str(scenes), "model": str(saved_model)}
    arguments = shlex.split(command.format(**names))
    refused(captioner(*arguments), *(word.format(**names) for word in words))


@pytest.mark.parametrize("command", ["run", "compile", "submit"])
def test_without_kfp_the_library_says_how_to_get_it(command: str) -> None:
    code = (
        "import sys; sys.modules['kfp'] = None; from model_lib.cli import main; "
        f"main(['{command}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    line = f"{command}: needs kfp, which is not installed: pip install 'captioner[pipelines]'"
    assert (done.returncode, done.stderr) == (2, f"captioner: error: {line}\n")


def test_a_model_folder_without_weights_is_refused(
    captioner: Run, saved_model: Path, tmp_path: Path, scenes: Path
) -> None:
    weights = shutil.copytree(saved_model, tmp_path / "m") / "model.safetensors"
    image = scenes / "val2017" / "000000000001.jpg"
    weights.unlink()
    refused(captioner("caption", "-f", image, "--model", "./m"), "./m", "no safetensors")
    weights.write_bytes(b"no weights")
    refused(captioner("caption", "-f", image, "--model", "./m"), "./m")
