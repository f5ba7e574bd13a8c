"""An answer that is right is right in every script, and text in ASCII is judged as the libraries judge it."""

from __future__ import annotations

import random
import string
import unicodedata

import pytest

from instructft.evaluation.confidence import measures
from instructft.evaluation.words import rouge_l, words
from tests.helpers.evaluation import row

SCRIPTS = {
    "Latin": "Ça va très bien, où est la gare?",
    "Cyrillic": "Быть или не быть, вот в чём вопрос.",
    "Greek": "Η Αθήνα είναι η πρωτεύουσα.",
    "Arabic": "القاهرة هي عاصمة مصر.",
    "Hebrew": "ירושלים היא עיר עתיקה מאוד",
    "Devanagari": "दिल्ली भारत की राजधानी है।",
    "Tamil": "சென்னை ஒரு பெரிய நகரம்",
    "Bengali": "ঢাকা বাংলাদেশের রাজধানী শহর",
    "Georgian": "თბილისი არის დიდი ქალაქი",
    "Amharic": "አዲስ አበባ ትልቅ ከተማ ናት",
    "Hangul": "서울은 한국의 수도 입니다",
    "Chinese": "北京是中国的首都。",
    "Japanese": "東京は日本の首都です。",
    "Thai": "กรุงเทพเป็นเมืองหลวง",
    "Lao": "ວຽງຈັນເປັນນະຄອນຫຼວງ",
    "Khmer": "ភ្នំពេញជារាជធានី",
    "Burmese": "ရန်ကုန်သည်မြို့ကြီး",
    "Tibetan": "ལྷ་ས་ནི་གྲོང་ཁྱེར་ཡིན།",
    "Tifinagh": "ⴰⵣⵓⵍ ⴼⵍⵍⴰⵡⵏ ⴰⵢ ⵎⴷⴷⵏ",
    "emoji": "👍 👎 🎉 🚀",
    "signs": "!= == <> ->",
}


def bleu(prediction: str, reference: str) -> float:
    return measures([row(prediction=prediction, reference=reference)])["bleu"].whole()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_text_is_right_in_every_script_and_another_one_is_not(script: str) -> None:
    text = SCRIPTS[script]
    assert rouge_l(text, text) == 1.0
    assert bleu(text, text) == pytest.approx(100)
    other = SCRIPTS["Cyrillic" if script != "Cyrillic" else "Greek"]
    assert rouge_l(other, text) < 0.1
    assert bleu(other, text) < 10
    assert 0.3 < rouge_l(text[: len(text) // 2 + 1], text) < 1.0
    assert rouge_l(unicodedata.normalize("NFD", text), text) == 1.0
    assert bleu(unicodedata.normalize("NFD", text), text) == pytest.approx(100)


@pytest.mark.parametrize("text", ["Paris", "Да", "yes, sir", "东", "42", "👍", "="])
def test_answers_shorter_than_four_words_count(text: str) -> None:
    assert rouge_l(text, text) == 1.0
    assert bleu(text, text) == pytest.approx(100)
    assert bleu("something else entirely", text) == 0


def test_words_outside_ascii_are_whole() -> None:
    assert words("Ça va? Да, 3_4!") == ["ça", "va", "да", "3", "4"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("東京 Tower") == ["東", "京", "tower"]


def test_ascii_is_judged_as_the_libraries_judge_it() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    rng, scorer = random.Random(0), RougeScorer(["rougeL"])
    for _ in range(300):
        one, two = ("".join(rng.choices("ab c" + string.printable, k=40)) for _ in range(2))
        if words(one):
            assert rouge_l(two, one) == scorer.score(one, two)["rougeL"].fmeasure
        assert bleu(two, one) == sacrebleu.corpus_bleu([two], [[one]], use_effective_order=True).score
    for one, two in [("the cat sat on the mat", "the cat sat on a mat"), ("a b c d e", "a b c e d")]:
        assert bleu(two, one) == sacrebleu.corpus_bleu([two], [[one]]).score


def test_chinese_is_cut_as_sacrebleu_cuts_it() -> None:
    import sacrebleu

    for one, two in [("北京是中国的首都。", "南京不是中国的首都。"), ("我有3本书, OK?", "我有4本书, OK!")]:
        assert bleu(two, one) == pytest.approx(sacrebleu.corpus_bleu([two], [[one]], tokenize="zh").score)
