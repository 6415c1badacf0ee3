"""LongBench's metrics, equal to its own scoring to the digit (Bai et al. 2023, arXiv 2308.14508; its metrics.py).

Each metric compares an answer with one truth; `best` takes the best score over a question's truths. All scores are 0 to
1. The following oddities are those of the official scoring, kept so that numbers compare:

- ROUGE-L is that of the package `rouge`: sentences end at ".", words count once, precision and recall are of the union
  of the words in the longest common subsequences of all pairs of sentences. A long text without "." overflows that
  package's recursion, and the official script scores it 0; here it is scored.
- The similarity of code is fuzzywuzzy's `ratio` where python-Levenshtein is absent: difflib's ratio, in whole percent.
- The classification score skips the class after one that it removes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from importlib.util import find_spec

from ctxext.errors import DataError, EnvironmentFault

CHINESE = ("qa_f1_zh", "rouge_l_zh")  # these need jieba to cut text into words
_WIDE_PUNCTUATION = "！？｡＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
_CHINESE_PUNCTUATION = "。、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def best(metric: str, answer: str, truths: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns the score against the truth that fits `answer` best. `classes` are those of a classification."""
    return max(METRICS[metric](answer, truth, classes) for truth in truths)


def require_jieba(metrics: Sequence[str]) -> None:
    """Raises EnvironmentFault where one of `metrics` cuts Chinese words and jieba is not installed."""
    chinese = [metric for metric in metrics if metric in CHINESE]
    if chinese and find_spec("jieba") is None:
        raise EnvironmentFault(
            f"{' and '.join(dict.fromkeys(chinese))} need jieba for Chinese text, which is not installed",
            hint="pip install jieba, or give `tasks` without the Chinese ones",
        )


def qa_f1(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Returns the F1 of the words as a bag: lower case, without punctuation, a, an and the (SQuAD's normalisation)."""
    return _f1(_english_words(answer), _english_words(truth))


def qa_f1_zh(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Returns the F1 of jieba's words as a bag: lower case, without punctuation and white space."""
    return _f1(_chinese_words(answer), _chinese_words(truth))


def rouge_l(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Returns the ROUGE-L F1 of distinct words over all pairs of sentences (module docstring); 0 if one is empty."""
    answer_sentences, truth_sentences = _sentences(answer), _sentences(truth)
    if not answer_sentences or not truth_sentences:
        return 0.0
    common = set[str]().union(*(_common(t, a) for t in truth_sentences for a in answer_sentences))
    precision = len(common) / len(set().union(*answer_sentences))
    recall = len(common) / len(set().union(*truth_sentences))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Returns the ROUGE-L of jieba's words."""
    return rouge_l(" ".join(_jieba(answer)), " ".join(_jieba(truth)))


def classification(answer: str, truth: str, classes: Sequence[str]) -> float:
    """Returns 1 / (number of classes named in the answer) if the true class is among them, else 0.

    A class whose name is part of the true one's is not counted.
    """
    named = [name for name in classes if name in answer]
    at = 0
    while at < len(named):
        if named[at] in truth and named[at] != truth:
            del named[at]
        at += 1  # after a removal this skips the next class, as the official loop does
    return 1.0 / len(named) if truth in named else 0.0


def count(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Returns the share of the answer's numbers that equal the truth."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def retrieval(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Returns the share of the answer's numbers that equal the number of the true `Paragraph N`."""
    return count(answer, _number(r"Paragraph (\d+)", truth))


def retrieval_zh(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Like `retrieval`, in Chinese."""
    return count(answer, _number(r"段落(\d+)", truth))


def code_similarity(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Returns the similarity of the truth and the answer's first line without backtick, # or //; 0 if one is empty."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == truth:
        return 1.0
    return round(100 * SequenceMatcher(None, line, truth).ratio()) / 100 if line and truth else 0.0


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_similarity": code_similarity,
}


def _f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    same = (Counter(answer) & Counter(truth)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(answer), same / len(truth)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _chinese_words(text: str) -> list[str]:
    dropped = set(string.punctuation + _WIDE_PUNCTUATION + _CHINESE_PUNCTUATION)
    bare = ("".join("".join(c for c in word.lower() if c not in dropped).split()) for word in _jieba(text))
    return [word for word in bare if word]


def _jieba(text: str) -> list[str]:
    import jieba

    return list(jieba.cut(text, cut_all=False))


def _sentences(text: str) -> list[list[str]]:
    """Returns the words of each part between dots; a part of white space alone has one empty word, as in `rouge`."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common(truth: Sequence[str], answer: Sequence[str]) -> set[str]:
    """Returns the words of a longest common subsequence; on a tie the walk back skips a word of the answer."""
    longest = [[0] * (len(answer) + 1) for _ in range(len(truth) + 1)]
    for i, word in enumerate(truth, start=1):
        for j, other in enumerate(answer, start=1):
            same = word == other
            longest[i][j] = longest[i - 1][j - 1] + 1 if same else max(longest[i - 1][j], longest[i][j - 1])
    # Walk back through the table [truth + 1, answer + 1] and collect the matched words.
    words, i, j = set(), len(truth), len(answer)
    while i and j:
        if truth[i - 1] == answer[j - 1]:
            words.add(truth[i - 1])
            i, j = i - 1, j - 1
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _number(pattern: str, truth: str) -> str:
    found = re.search(pattern, truth)
    if found is None:
        raise DataError(f"the true answer {truth!r} names no paragraph", hint="LongBench writes Paragraph N, or 段落N")
    return found[1]
