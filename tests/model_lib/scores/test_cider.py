"""CIDEr-D: the official toolkit's scores."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from model_lib.scores.cider import END, CiderD, consensus, corpus_cider, words

REFERENCES = {
    1: ["a red circle on a white background", "one red circle", "a circle"],
    2: ["two blue squares", "blue squares on white"],
    3: ["a green triangle left of a red circle", "a triangle and a circle"],
}


def official(
    captions: dict[int, str], references: dict[int, list[str]]
) -> tuple[float, list[float]]:
    """Return the official CIDEr of captions that are split already."""
    from pycocoevalcap.cider.cider import Cider

    score, each = Cider().compute_score(references, {key: [text] for key, text in captions.items()})
    return float(score), list(each)


def test_scores_are_the_official_toolkits_on_coco(coco_eval: Path) -> None:
    references = defaultdict(list)
    for row in json.loads(next(coco_eval.glob("captions_*_1000.json")).read_text())["annotations"]:
        references[row["image_id"]].append(" ".join(words(row["caption"])))
    results = json.loads(next(coco_eval.glob("*fakecap*.json")).read_text())
    captions = {row["image_id"]: " ".join(words(row["caption"])) for row in results}
    score, each = official(captions, {key: references[key] for key in captions})
    assert corpus_cider(captions, references) == pytest.approx(score, abs=1e-9)
    scorer = CiderD([text.split() for text in references[key]] for key in captions)
    numbers = [*range(0, len(captions), 2), *range(1, len(captions), 2)]  # in any order
    split = [text.split() for text in captions.values()]
    scores = scorer.scores([split[number] for number in numbers], numbers)
    assert scores.tolist() == pytest.approx([each[number] for number in numbers], abs=1e-9)


@pytest.mark.parametrize(
    "caption", ["", "a", "a a a a a a", "a red circle on a white background", "unheard of words"]
)
def test_odd_captions_score_as_officially(caption: str) -> None:
    captions = {1: caption, 2: "two blue squares", 3: caption}
    expected, _ = official(captions, REFERENCES)
    assert corpus_cider(captions, REFERENCES) == pytest.approx(expected, abs=1e-9)


def test_with_the_end_as_a_word_a_truncated_sentence_scores_less() -> None:
    references = [[[*text.split(), END] for text in texts] for texts in REFERENCES.values()]
    scorer = CiderD(references)

    def score(text: str) -> float:
        return float(scorer.scores([text.split()], [0])[0])

    # Without it "a red circle on a", which shares every n-gram with the whole sentence, would be
    # nearly as good.
    sentence = "a red circle on a white background"
    assert score("a red circle on a") < 0.8 * score(f"{sentence} {END}")
    assert score(sentence) < score(f"{sentence} {END}")


@pytest.mark.usefixtures("java")
def test_coco_is_split_as_by_the_official_tokenizer(coco_eval: Path) -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    file = next(coco_eval.glob("captions_*_1000.json"))
    rows = json.loads(file.read_text())["annotations"]
    official = PTBTokenizer().tokenize({row["id"]: [row] for row in rows})
    differ = [row for row in rows if official[row["id"]] != [" ".join(words(row["caption"]))]]
    assert len(differ) <= len(rows) // 300, "times, abbreviations"


def test_captions_of_any_script_have_words() -> None:
    assert " ".join(words("Mädchen im Café, 2-mal. Кошка!")) == "mädchen im café 2-mal кошка"
    english = words("A dog's well-known ball_game --- isn't")
    assert " ".join(english) == "a dog 's well-known ball game is n't"
    assert words("it\u2019s") == words("it's") == ["it", "'s"]
    assert words("L'homme d'aujourd'hui") == ["l'homme", "d'aujourd'hui"]
    assert words("कुत्ता सोता है, பூனை") == ["कुत्ता", "सोता", "है", "பூனை"]
    assert words("cafe\u0301 一只猫。ネコ 2匹") == ["café", *"一只猫ネコ", "2", "匹"]
    captions = {1: "кошка сидит на столе", 2: "собака бежит по траве"}
    assert corpus_cider(captions, {key: [text] for key, text in captions.items()}) > 1


def test_the_caption_unlike_its_siblings_agrees_least() -> None:
    captions = [
        ["a red circle on white", "a red circle", "two dogs on grass"],
        ["blue squares", "blue squares", "a train"],
        ["a green triangle", "a triangle and a circle", "a green triangle on white"],
    ]
    agreement = consensus(captions)
    assert [row.index(min(row)) for row in agreement] == [2, 2, 1]
    assert agreement[1] == pytest.approx([2.5, 2.5, 0.0]), "two of four orders, one of two others"
