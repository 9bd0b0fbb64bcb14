"""Question answering on a planted passage: a short text of made-up facts, among others like it, in a long one (after
RULER, arXiv 2404.06654, section 3.4, which takes its passages from data sets)."""

from __future__ import annotations

import dataclasses

import numpy as np

from xkv_fx.evaluation.tasks.base import Drawn, Encoder, Instance, bury, register_task
from xkv_fx.evaluation.tasks.words import draw

PASSAGES = 3
_OPENING = "Read the following text. A question about it comes afterwards.\n\n"

_PEOPLE = (
    "Alma Brandt", "Anton Keller", "Beatrix Holm", "Bruno Castell", "Carla Jensen", "Cyril Novak", "Dora Lindqvist",
    "Edgar Moreau", "Elena Rossi", "Felix Andersen", "Greta Vogel", "Hugo Laurent", "Ingrid Dahl", "Ivan Petrov",
    "Julia Santos", "Karl Nyberg", "Lena Fischer", "Marco Bellini", "Nora Whitfield", "Oscar Lund", "Petra Horvat",
    "Quentin Dubois", "Rosa Delgado", "Stefan Meyer", "Tessa Kowalski", "Ulrich Baumann", "Vera Sokolova",
    "Walter Jansen", "Yara Haddad", "Zoltan Szabo",
)  # fmt: skip
_TOWNS = (
    "Aldermoor", "Brightwater", "Carrowdale", "Dunhaven", "Elmsworth", "Fairholt", "Glenmarsh", "Hartsfield",
    "Ironbridge", "Juniper Hill", "Kingsmere", "Larkspur", "Millbrook", "Northwick", "Oakhurst", "Pinecrest",
    "Queensferry", "Ravenscar", "Stonebury", "Thornfield", "Upper Lindon", "Violet Bay", "Westmarch", "Yarrowby",
)  # fmt: skip
_CITIES = (
    "Lisbon", "Vienna", "Oslo", "Prague", "Dublin", "Athens", "Cairo", "Lima", "Havana", "Nairobi", "Helsinki",
    "Warsaw", "Budapest", "Madrid", "Brussels", "Copenhagen", "Istanbul", "Manila", "Quito", "Santiago",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A kind of passage: its text, and questions with the part of it that answers them.

    Attributes:
        text: with places for `town`, `person`, `city` and `year`.
        questions: question, first words of its answer, and the name of what answers it.
    """

    text: str
    questions: tuple[tuple[str, str, str], ...]


_SUBJECTS = (
    _Subject(
        "The museum of {town} opened its doors in {year}. It was designed by {person}, an architect who had studied in "
        "{city}.",
        (
            ("Who designed the museum of {town}?", "The museum of {town} was designed by", "person"),
            ("In which year did the museum of {town} open?", "The museum of {town} opened in the year", "year"),
            ("Where had the architect of the museum of {town} studied?", "The architect had studied in", "city"),
        ),
    ),
    _Subject(
        "The great fire of {town} broke out in {year}. {person}, who had come from {city} that week, saved the "
        "library.",
        (
            ("Who saved the library of {town}?", "The library of {town} was saved by", "person"),
            ("In which year was the great fire of {town}?", "The great fire of {town} was in the year", "year"),
            ("From where had the rescuer of {town}'s library come?", "The rescuer had come from", "city"),
        ),
    ),
    _Subject(
        "Every spring the orchestra of {town} plays a symphony that {person} wrote in {year} on a journey to {city}.",
        (
            ("Who wrote the symphony that is played in {town}?", "The symphony was written by", "person"),
            ("In which year was the symphony of {town} written?", "The symphony was written in the year", "year"),
            ("Where did the composer of {town}'s symphony travel?", "The composer was on a journey to", "city"),
        ),
    ),
    _Subject(
        "The clock tower of {town} was built by {person} in {year}, and its bell was cast in {city}.",
        (
            ("Who built the clock tower of {town}?", "The clock tower of {town} was built by", "person"),
            ("In which year was the clock tower of {town} built?", "The clock tower was built in the year", "year"),
            ("Where was the bell of {town}'s clock tower cast?", "The bell was cast in", "city"),
        ),
    ),
)


@register_task("passage_qa")
def passage_qa(encoder: Encoder, rng: np.random.Generator, length: int) -> Instance:
    """Three passages about different things in different towns; one of nine questions about them."""
    subjects = [_SUBJECTS[place] for place in rng.permutation(len(_SUBJECTS))[:PASSAGES].tolist()]
    towns, people, cities = (draw(rng, words, PASSAGES) for words in (_TOWNS, _PEOPLE, _CITIES))
    years = [str(1700 + place) for place in rng.permutation(290)[:PASSAGES].tolist()]
    facts = [
        {"town": town, "person": person, "city": city, "year": year}
        for town, person, city, year in zip(towns, people, cities, years, strict=True)
    ]
    needles = tuple(subject.text.format(**fact) for subject, fact in zip(subjects, facts, strict=True))
    asked = int(rng.integers(PASSAGES))
    question, opening, answer = subjects[asked].questions[int(rng.integers(3))]
    question = f"\n\nQuestion: {question.format(**facts[asked])}\nAnswer: {opening.format(**facts[asked])}"
    absent = tuple(value for fact in facts for value in fact.values())
    return bury(encoder, rng, length, _OPENING, Drawn(needles, question, (facts[asked][answer],), absent))
