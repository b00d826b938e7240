"""Ordinary words, and texts composed of them that have a given number of tokens.

Knows words and what each costs. Leaves asking a tokenizer to :mod:`pytest_gpulayout.adapters.prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

MANY_WORDS = """
amber bridge castle dozen engine forest glacier harbor island jungle kettle lantern meadow needle orchard pepper
quartz river saddle timber umbrella valley window xylophone yellow zebra anchor basket candle desert elephant
feather guitar hammer insect jacket kitchen ladder magnet notebook ocean pencil quilt rabbit silver tunnel uncle
violin whistle yogurt zipper answer before circle during either follow garden happen inside justice known listen
minute nothing often people question remember second thousand until village wonder young because children
different everything finally government however important language mountain national operation possible quickly
several together usually various without yesterday zero one two three four five six seven eight nine ten 11 13 17
19 23 29 31 37 41 43 47 53 59 61 67 71 73 79 83 89 97 Paris Tokyo Lima Cairo Oslo Delhi Rome Kyiv (blue) [green]
{red} "black" 'white' a+b=c x*y/z u<v>w 50% #1 @home & so; on: and, then! why? yes. no_way all-round
"""
"""Words of many kinds, so that every tokenizer, a byte-level one included, makes many different ids of them."""

OPENING = "Words"
"""What each composed text begins with, since a word without a blank before it may cost something else."""

COMMON_WORDS = (
    *("a", "at", "the", "time", "water", "people", "through", "question", "important", "government"),
    *("and", "day", "year", "long", "house", "small", "world", "number", "between", "children"),
    *("city", "river", "music", "paper", "light", "school", "story", "family", "money", "country"),
    *("north", "south", "white", "black", "green", "table", "second", "summer", "letter", "market"),
)
"""Words that nearly every tokenizer has as one token; of every length, so that one that counts bytes fits too."""


class Vocabulary:
    """Words with their price, and the texts that can be bought.

    :param costs: tokens of each word with the blank before it; all at least 1.
    """

    def __init__(self, costs: Mapping[str, int]) -> None:
        self._words = tuple(costs)
        self._costs = dict(costs)
        self._reachable = [True]  # by number of tokens

    def compose(self, tokens: int, random: Random) -> str | None:
        """Return :data:`OPENING` and random words after it that cost exactly ``tokens``.

        :returns: the text; ``None`` where no sum of the words' prices is ``tokens``.
        """
        if tokens < 0 or not self._can_reach(tokens):
            return None
        words = [OPENING]
        while tokens:
            word = random.choice(self._words)
            left = tokens - self._costs[word]
            if left >= 0 and self._can_reach(left):
                words.append(word)
                tokens = left
        return " ".join(words)

    def _can_reach(self, tokens: int) -> bool:
        prices = set(self._costs.values())
        for total in range(len(self._reachable), tokens + 1):
            self._reachable.append(any(price <= total and self._reachable[total - price] for price in prices))
        return self._reachable[tokens]
