"""What drawn pages say: names, addresses, dates, amounts, and strings that no language model could guess.

Half of the words are made of random syllables or symbols, so that a reader must look instead of remembering.
"""

from __future__ import annotations

import random

__all__ = ["address", "amount", "code", "company", "date", "item", "phrase", "syllables", "telephone", "word"]

_COMMON = """the and for with thank you please come again goods sold are not returnable cash change total
amount item price qty description discount rounding tax invoice receipt no date time table guest cashier
counter member card balance points visa master payment tender summary rate incl excl service charge order take
away dine in set chicken rice noodle tea coffee milk sugar bread egg fish beef soup fried ice lemon water
mineral paper pen book glue tape cable lamp wire screw nail paint brush bolt pipe plug battery shirt shoe bag
box small large medium red blue green black white grey refund exchange within days original condition keep
this for enquiry contact hotline website customer copy approved street road park garden square hall market
station centre plaza tower floor unit block lot main north south east west report memo letter subject agenda
department project number version page section budget plan review draft final""".split()
_KINDS = """TRADING ENTERPRISE MART MINIMARKET RESTAURANT BAKERY HARDWARE STATIONERY PHARMACY BOOKSTORE
CAFE STORE""".split()
_ENDINGS = "SDN BHD|SDN. BHD.|LTD|LIMITED|& CO|INC|PLT|GROUP|(M) SDN BHD|".split("|")
_TOWNS = (
    "JOHOR BAHRU|SHAH ALAM|KUALA LUMPUR|PETALING JAYA|KLANG|IPOH|MELAKA|PENANG|SELANGOR|PUCHONG|CHERAS".split(
        "|"
    )
)
_WAYS = "JALAN|JLN|LORONG|TAMAN|PERSIARAN|BANDAR|STREET|ROAD|AVENUE|KAMPUNG".split("|")
_MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()
_ONSETS = ["", *"b c d f g h j k l m n p r s t v w y z ch sh th tr st br kh ng".split()]
_VOWELS = "a e i o u a i u ai ee ou".split()
_CODAS = ["", "", "", "n", "m", "r", "s", "t", "k", "l", "ng", "h", "p"]
_SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 2 + "0123456789" * 4 + ".,:;-/()#&*+%@'=!?$\""


def syllables(chance: random.Random) -> str:
    count = chance.choice((1, 2, 2, 3))
    return "".join(
        chance.choice(_ONSETS) + chance.choice(_VOWELS) + chance.choice(_CODAS) for _ in range(count)
    )


def word(chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.45:
        return chance.choice(_COMMON)
    if kind < 0.8:
        return syllables(chance)
    if kind < 0.9:
        return code(chance)
    return "".join(chance.choice(_SYMBOLS) for _ in range(chance.randint(1, 7)))


def phrase(chance: random.Random, words: int) -> str:
    """So many words in one of the ways print is cased; sometimes closed by a colon or a full stop."""
    text = " ".join(word(chance) for _ in range(words))
    text = (text.upper, text.upper, text.title, text.capitalize, text.lower)[chance.randrange(5)]()
    return text + chance.choice(("", "", "", "", ":", ".", ",", "!", " :"))


def code(chance: random.Random) -> str:
    """A number of some kind: digits with and without letters, hyphens and brackets."""
    digits = "".join(chance.choice("0123456789") for _ in range(chance.randint(2, 9)))
    return chance.choice(
        (digits, digits, f"#{digits}", f"{digits}-{chance.choice('ABDHKMPTVX')}", f"({digits})", f"A{digits}")
    )


def amount(chance: random.Random, largest: float = 500.0) -> str:
    """Digits with two decimals: "12.90"; small ones more often."""
    return f"{round(chance.random() ** 3 * largest + 0.05, chance.choice((1, 2, 2))):.2f}"


def date(chance: random.Random) -> str:
    """A date in one of the formats found on receipts, day before month."""
    day, month, year = chance.randint(1, 28), chance.randint(1, 12), chance.randint(2008, 2026)
    return chance.choice(
        (
            f"{day:02}/{month:02}/{year}",
            f"{day:02}/{month:02}/{year}",
            f"{day:02}-{month:02}-{year}",
            f"{day:02}/{month:02}/{year % 100:02}",
            f"{day:02}-{month:02}-{year % 100:02}",
            f"{day:02}.{month:02}.{year}",
            f"{day} {_MONTHS[month - 1]} {year}",
            f"{day:02}-{_MONTHS[month - 1]}-{year}",
            f"{year}-{month:02}-{day:02}",
        )
    )


def telephone(chance: random.Random) -> str:
    return f"0{chance.randint(1, 9)}-{chance.randint(10**6, 10**8 - 1)}"


def company(chance: random.Random) -> str:
    name = " ".join(syllables(chance) for _ in range(chance.randint(1, 2))).upper()
    return f"{name} {chance.choice(_KINDS)} {chance.choice(_ENDINGS)}".strip()


def address(chance: random.Random) -> list[str]:
    """Two or three lines, upper case."""
    door = f"{chance.choice(('NO. ', 'NO ', 'LOT ', ''))}{chance.randint(1, 999)}"
    first = f"{door}, {chance.choice(_WAYS)} {syllables(chance).upper()}"
    if chance.random() < 0.6:
        first += f" {chance.randint(1, 30)}/{chance.randint(1, 99)}"
    middle = f"{chance.choice(_WAYS)} {syllables(chance).upper()}"
    last = f"{chance.randint(10000, 99999)} {chance.choice(_TOWNS)}"
    return [f"{first},", f"{middle},", f"{last}."] if chance.random() < 0.6 else [f"{first},", f"{last}."]


def item(chance: random.Random) -> str:
    return phrase(chance, chance.randint(1, 3)).upper().rstrip(" :.,!")
