"""RULER's thirteen tasks as text, of a size that the caller chooses (Hsieh et al. 2024, arXiv 2404.06654, section 3).

The words of the prompts, the numbers of needles, chains and repeats, and the tokens generated are the official ones
(the repository NVIDIA/RULER: data/synthetic, synthetic.yaml). A prompt ends with the official beginning of the answer.
The question of a case is drawn before its filler, so that a case has the same question and answers at every size.

Deviations from the official generators:
- The haystack of "essay" tasks is any given text, not copyrighted essays, and is repeated if it is too short. Its
  sentences end at a word that ends in . ! or ? (officially NLTK's splitter decides).
- Positions of needles and assignments are shares of the filler, drawn once. Lines are not drawn without replacement,
  as officially: there is only one needle among lines, and vt's assignments stay in order.
- Distractors never use the requested keys. The two values of vt (the example's, the question's) differ.
- vt's prompt has no space at its end, and one space, not two, before its example's answer (the current official
  pipeline strips the end too): with most tokenizers a space there is a token that the answer would begin with.
- cwe has no longer list of English words as a fallback: if every word of wonderwords is listed, its prompt stays
  shorter than the length. It lists at least twenty words, ten of them common.
- fwe has at least 53 draws; from this number on, the three requested words and the next one never have equal counts.
- qa's questions come in a shuffled order, the same at every length, instead of the order of the file.
- No chat template is put around a prompt: ctxext measures base models and reports that it does.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle, islice, pairwise
from typing import Any, TypeVar

from ctxext.data.cases import private_random

T = TypeVar("T")
Drawn = tuple[str, tuple[str, ...], dict[str, Any]]  # prompt, references, facts

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # percent of the sentences before a needle
HOPS = 4  # assignments of vt's chain after the first
COMMON = 10  # number of words that cwe asks for
CWE_LONG = 4096  # length in tokens from which cwe repeats its words as often as in the paper
FWE_LEAST = 53


@dataclass(frozen=True)
class Questions:
    """A data set of questions: `entries` are (question, answers, documents it needs, documents of the same article).

    Documents are indices into `documents`.
    """

    documents: tuple[str, ...]
    entries: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class Material:
    """What tasks are made of; only the parts that a task uses must be present.

    hay            words of the text that needles are hidden in
    words          words of cwe: nouns, adjectives and verbs, each once, sorted
    example_lines  number of noise lines in vt's example
    """

    hay: Sequence[str] = ()
    nouns: Sequence[str] = ()
    adjectives: Sequence[str] = ()
    words: Sequence[str] = ()
    questions: Mapping[str, Questions] = field(default_factory=dict)
    example_lines: int = 10


@dataclass(frozen=True)
class Ask:
    """A request for case `number` of a task at a length, in tokens."""

    task: str
    length: int
    number: int
    seed: int = 0

    @property
    def id(self) -> str:
        """The id of the case: task, length and number."""
        return f"{self.task}/{self.length}/{self.number}"

    def rng(self) -> random.Random:
        """Returns the random generator of this case."""
        return private_random("ruler", self.seed, self.task, self.length, self.number)


@dataclass(frozen=True)
class RulerTask:
    """A task: `make(ask, size, material)` makes a case of `size`, from `least` to `most`.

    The size is a number of words of text, lines, words or documents.
    """

    make: Callable[[Ask, int, Material], Drawn]
    new_tokens: int
    least: int = 1
    most: Callable[[Material], float] = lambda _: math.inf


def _niah(
    ask: Ask,
    size: int,
    material: Material,
    hay: str,
    key: str = "words",
    value: str = "numbers",
    keys: int = 1,
    values: int = 1,
    requested: int = 1,
) -> Drawn:
    """Hides `keys` keys with `values` values each in `hay` (essay, noise, needles) and asks for `requested` keys."""
    rng = ask.rng()
    # Draw keys, values and question before the filler, so that they do not depend on the size.
    names: list[str] = []
    while len(names) < keys:
        if (name := _random(key, rng, material)) not in names:
            names.append(name)
    held = [[_random(value, rng, material) for _ in range(values)] for _ in names]
    needles = [_needle(value, name, number) for name, numbers in zip(names, held, strict=True) for number in numbers]
    rng.shuffle(needles)
    wanted = rng.sample(range(keys), requested)
    # In an essay each needle has its own depth; among lines all needles are at one place (there is one needle).
    if hay == "essay":
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        text = _hidden(_repeated(material.hay, size), needles, depths)
    else:
        depth = rng.random()
        lines = [NOISE if hay == "noise" else _distractor(key, value, names, rng, material) for _ in range(size)]
        place = int(depth * size)
        text, depths = "\n".join([*lines[:place], *needles, *lines[place:]]), [round(100 * depth)]
    before, after = _about(value, [names[i] for i in wanted], requested * values > 1)
    return before + text + after, tuple(number for i in wanted for number in held[i]), {"depths": depths}


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _about(kind: str, keys: Sequence[str], many: bool) -> tuple[str, str]:
    """Returns what comes before the text and what comes after it."""
    what = kind if many else kind.removesuffix("s")
    some, are, are_all = ("Some", "are", "are all") if many else ("A", "is", "is")
    query = f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
    before = f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. "
    before += f"I will quiz you about the {what} afterwards.\n"
    after = f"\nWhat {are_all} the special magic {what} for {query} mentioned in the provided text? "
    return before, after + f"The special magic {what} for {query} mentioned in the provided text {are}"


def _random(kind: str, rng: random.Random, material: Material) -> str:
    if kind == "words":
        return f"{rng.choice(material.adjectives)}-{rng.choice(material.nouns)}"
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _distractor(key: str, value: str, taken: Sequence[str], rng: random.Random, material: Material) -> str:
    # A distractor with a requested key would make the answer ambiguous.
    while (name := _random(key, rng, material)) in taken:
        pass
    return _needle(value, name, _random(value, rng, material))


def _repeated(words: Sequence[str], count: int) -> Sequence[str]:
    return words[:count] if count <= len(words) else list(islice(cycle(words), count))


def _hidden(words: Sequence[str], needles: Sequence[str], depths: Sequence[int]) -> str:
    """Returns `words` with each needle between two sentences, after `depths` percent of the sentences (ascending)."""
    # A sentence begins after a word that ends in . ! or ?, ignoring closing quotes and brackets.
    starts = [0, *(i + 1 for i, word in enumerate(words[:-1]) if word.rstrip("\"')]").endswith((".", "!", "?")))]
    starts.append(len(words))
    parts, done = [], 0
    for needle, depth in zip(needles, depths, strict=True):
        place = starts[int((len(starts) - 1) * depth / 100)]
        parts += [*words[done:place], needle]
        done = place
    return " ".join([*parts, *words[done:]])


def _vt(ask: Ask, size: int, material: Material) -> Drawn:
    """Makes a chain of assignments among lines of noise, after an example with shorter names and its answer."""
    rng = ask.rng()
    other, value = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    example = vt_example(rng, other, material.example_lines)
    names = _names(rng, 5)
    return example + "\n\n" + _tracked(rng, names, value, size), tuple(names), {"value": value}


def vt_example(rng: random.Random, value: str, lines: int) -> str:
    """Returns the example of vt: names of three letters, `lines` (at least 5) of noise, and the answer."""
    names = _names(rng, 3)
    return f"{_tracked(rng, names, value, lines)} {' '.join(names)}\n\n"


def _names(rng: random.Random, letters: int) -> list[str]:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names


def _tracked(rng: random.Random, names: Sequence[str], value: str, lines: int) -> str:
    assignments = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(names))]
    # Sorted shares keep the chain in order; `+ i` gives each assignment a line of its own.
    shares = sorted(rng.random() for _ in assignments)
    places = {int(share * (lines - HOPS)) + i: assignments[i] for i, share in enumerate(shares)}
    parts = [part for i in range(lines) for part in (places.get(i), NOISE + "\n") if part is not None]
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{' '.join(parts)}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        # The misspelling is in the paper's prompt, with which all published numbers were measured.
        f"chain(s) of variable assignment in the text above, {len(names)} variables are assgined the value {value}, "
        "they are:"
    )


def _cwe(ask: Ask, size: int, material: Material) -> Drawn:
    """Lists `size` words with numbers, the first ten far more often than the rest, after an example with its answer."""
    rng = ask.rng()
    count, common, rare = (40, 10, 3) if ask.length >= CWE_LONG else (20, 3, 1)
    shown = rng.sample(material.words, count)
    example = _listed(rng, shown, common, rare) + _numbered(shown[:COMMON])
    common, rare = (30, 3) if ask.length >= CWE_LONG else (6, 1)
    words = list(islice(_shuffled(rng, material.words), size))
    return f"{example}\n{_listed(rng, words, common, rare)}", tuple(words[:COMMON]), {}


def _listed(rng: random.Random, words: Sequence[str], common: int, rare: int) -> str:
    listed = [*words[:COMMON]] * common + [*words[COMMON:]] * rare
    rng.shuffle(listed)
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(listed)}\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _fwe(ask: Ask, size: int, material: Material) -> Drawn:
    """Makes words with frequencies that fall as rank^-2 (zeta distribution, alpha 2.0); the first is dots, as noise."""
    rng = ask.rng()
    made = {"...": 1}
    while len(made) < max(5, ask.length // 50):
        made["".join(rng.choices(string.ascii_lowercase, k=6))] = 1
    coded = list(made)
    # `size` draws in expectation: each word occurs exactly its expected number of times, rounded down.
    zeta = math.pi**2 / 6
    text = [word for rank, word in enumerate(coded, start=1) for _ in range(int(size / rank**2 / zeta))]
    rng.shuffle(text)
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )
    return prompt, tuple(coded[1:4]), {}


def _qa(ask: Ask, size: int, material: Material) -> Drawn:
    """Asks a question among `size` documents: those it needs, those of the same article, any others, then repeats."""
    source = material.questions[ask.task]
    # The order of questions has its own generator without the length, so it is the same at every length.
    order = list(_shuffled(private_random("ruler", ask.seed, ask.task), range(len(source.entries))))
    question, answers, needed, near = source.entries[order[ask.number % len(order)]]
    rng, known = ask.rng(), {*needed, *near}
    far = (i for i in _shuffled(rng, range(len(source.documents))) if i not in known)
    count = max(size, len(needed))
    chosen = list(islice(chain(needed, list(_shuffled(rng, near)), far), count))
    chosen = list(islice(cycle(chosen), count))
    rng.shuffle(chosen)
    documents = "\n\n".join(f"Document {n}:\n{source.documents[i]}" for n, i in enumerate(chosen, start=1))
    intro = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    prompt = f"{intro}\n\nThe following are given documents.\n\n{documents}\n\n{intro}\n\nQuestion: {question} Answer:"
    return prompt, answers, {}


def _shuffled(rng: random.Random, items: Sequence[T]) -> Iterator[T]:
    """Yields `items` in random order, drawn one by one: the beginning is the same however many are taken."""
    # Fisher-Yates on a virtual list: `moved` has only the entries that a swap has changed.
    moved: dict[int, int] = {}
    for i in range(len(items)):
        j = rng.randrange(i, len(items))
        picked = moved.get(j, j)
        moved[j] = moved.get(i, i)
        yield items[picked]


TASKS: dict[str, RulerTask] = {
    "niah_single_1": RulerTask(partial(_niah, hay="noise"), 128),
    "niah_single_2": RulerTask(partial(_niah, hay="essay"), 128),
    "niah_single_3": RulerTask(partial(_niah, hay="essay", value="uuids"), 128),
    "niah_multikey_1": RulerTask(partial(_niah, hay="essay", keys=4), 128),
    "niah_multikey_2": RulerTask(partial(_niah, hay="needles"), 128),
    "niah_multikey_3": RulerTask(partial(_niah, hay="needles", key="uuids", value="uuids"), 128),
    "niah_multivalue": RulerTask(partial(_niah, hay="essay", values=4), 128),
    "niah_multiquery": RulerTask(partial(_niah, hay="essay", keys=4, requested=4), 128),
    "vt": RulerTask(_vt, 30, least=HOPS + 1),
    "cwe": RulerTask(_cwe, 120, least=2 * COMMON, most=lambda material: len(material.words)),
    "fwe": RulerTask(_fwe, 50, least=FWE_LEAST),
    "qa_1": RulerTask(_qa, 32),
    "qa_2": RulerTask(_qa, 32, least=10),
}
QA = {"qa_1": "squad", "qa_2": "hotpotqa"}  # the spec's field with the path of a task's file
WORDY = tuple(name for name in TASKS if name.startswith("niah") or name == "cwe")  # tasks that need wonderwords
