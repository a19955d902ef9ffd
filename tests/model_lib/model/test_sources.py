"""A model's folder, and what tells its weights from others."""

from pathlib import Path

from model_lib.model.sources import weights_digest


def test_other_weights_have_another_digest_and_the_same_elsewhere_have_the_same(
    tmp_path: Path,
) -> None:
    def folder(name: str, **files: bytes) -> str:
        (tmp_path / name).mkdir()
        for file, content in {
            "config.json": b"{}",
            "one.safetensors": b"1",
            "two.safetensors": b"2",
            **files,
        }.items():
            (tmp_path / name / file.replace("_", ".")).write_bytes(content)
        return weights_digest(str(tmp_path / name))

    known = folder("first")
    assert folder("elsewhere", training_json=b"another run") == known and len(known) == 64
    changed = [
        folder("weights", two_safetensors=b"3"),
        folder("shape", config_json=b"[]"),
        folder("cut", one_safetensors=b"12", two_safetensors=b""),
        folder("more", three_safetensors=b""),
    ]
    assert len({known, *changed}) == 5
