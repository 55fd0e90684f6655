"""What pages look like: receipts, documents, tables, forms and unrelated lines. Each fills a sheet, and tells
the key fields that it has printed.
"""

from __future__ import annotations

from collections.abc import Callable

from stepwell.reader import words
from stepwell.reader.sheet import Sheet

__all__ = ["LAYOUTS"]

Fields = dict[str, str]
"""company, date, address, total: those that stand on the page, as printed."""


def _receipt(sheet: Sheet) -> Fields:
    chance, fields = sheet.chance, {}
    heading = sheet.scaled(chance.uniform(1.0, 1.5))
    align = chance.choice(("center", "center", "left"))
    if name := sheet.row(words.company(chance), align=align, face=heading):
        fields["company"] = name[0]
    place = [written for line in words.address(chance) for written in sheet.row(line, align=align)]
    if place:
        fields["address"] = " ".join(place)
    if chance.random() < 0.6:
        sheet.row(f"TEL: {words.telephone(chance)}", align=align)
    if chance.random() < 0.5:
        sheet.row(
            chance.choice(("TAX INVOICE", "CASH BILL", "INVOICE", "RECEIPT")), align="center", face=heading
        )
    sheet.skip(chance.uniform(0, 1))
    _date_row(sheet, fields)
    for _ in range(chance.randint(0, 2)):
        sheet.row(f"{words.phrase(chance, 1)} {words.code(chance)}")
    sheet.rule()
    below = round(sheet.face.line_height * chance.uniform(6, 10))
    while sheet.top + below < sheet.ink.shape[0] and chance.random() < 0.93:
        row = [words.item(chance), words.amount(chance)]
        if chance.random() < 0.3:
            row.insert(1, str(chance.randint(1, 9)))
        sheet.row(*row)
    sheet.rule()
    _sums(sheet, fields)
    while not sheet.full and chance.random() < 0.85:
        sheet.row(words.phrase(chance, chance.randint(1, 5)), align=chance.choice(("center", "left")))
    return fields


def _date_row(sheet: Sheet, fields: Fields) -> None:
    chance = sheet.chance
    date = words.date(chance)
    clock = f"{chance.randint(0, 23):02}:{chance.randint(0, 59):02}"
    label = chance.choice(("DATE: ", "Date : ", "DATE ", "", "Date:", "INV DATE: "))
    style = chance.random()
    if style < 0.4:
        written = sheet.row(f"{label}{date}")
    elif style < 0.7:
        written = sheet.row(f"{label}{date}", clock)
    else:
        written = sheet.row(f"{label}{date} {clock}")
    if written and date in written[0]:
        fields["date"] = date


def _sums(sheet: Sheet, fields: Fields) -> None:
    chance = sheet.chance
    total = words.amount(chance)
    paid = f"{float(total) + chance.choice((0, 0.1, 1.5, 5, 10)):.2f}"
    currency = chance.choice(("", "", "RM", "RM ", "$"))
    label = chance.choice(
        ("TOTAL", "TOTAL", "TOTAL:", "GRAND TOTAL", "TOTAL AMOUNT", "NET TOTAL", "TOTAL (RM)", "TOTAL SALES")
    )
    large = sheet.scaled(chance.choice((1.0, 1.0, 1.2)))
    if chance.random() < 0.5:
        sheet.row(chance.choice(("SUBTOTAL", "SUB TOTAL", "ITEMS")), words.amount(chance, float(total) + 1))
    if chance.random() < 0.4:
        sheet.row(chance.choice(("GST 6%", "TAX", "ROUNDING", "SERVICE CHARGE 10%")), words.amount(chance, 5))
    written = sheet.row(label, currency + total, face=large)
    if len(written) == 2 and written[1].endswith(total):
        fields["total"] = total
    if chance.random() < 0.7:
        sheet.row(chance.choice(("CASH", "VISA", "TENDERED", "PAID")), paid)
        sheet.row(chance.choice(("CHANGE", "CHANGE DUE", "BALANCE")), f"{float(paid) - float(total):.2f}")


def _document(sheet: Sheet) -> Fields:
    chance = sheet.chance
    sheet.row(
        words.phrase(chance, chance.randint(2, 4)),
        align=chance.choice(("center", "left")),
        face=sheet.other(sheet.text[1]),
    )
    while not sheet.full:
        style = chance.random()
        if style < 0.5:
            _paragraph(sheet, chance.randint(2, 5))
        elif style < 0.7:
            for _ in range(chance.randint(1, 4)):
                sheet.row(words.phrase(chance, 1), words.phrase(chance, 2))
        elif style < 0.85:
            _table(sheet, most=chance.randint(3, 8))
        else:
            sheet.rule()
        sheet.skip(chance.uniform(0.2, 1.0))
    return {}


def _paragraph(sheet: Sheet, rows: int) -> None:
    count = max(2, sheet.width // (6 * sheet.face.size // 2))
    for _ in range(rows):
        sheet.row(words.phrase(sheet.chance, count))


def _table_page(sheet: Sheet) -> Fields:
    sheet.row(words.phrase(sheet.chance, 2), face=sheet.scaled(1.3))
    while not sheet.full:
        _table(sheet, most=sheet.chance.randint(6, 40))
        sheet.skip(sheet.chance.uniform(0.5, 2.0))
        if sheet.chance.random() < 0.3:
            _paragraph(sheet, sheet.chance.randint(1, 3))
    return {}


def _table(sheet: Sheet, *, most: int) -> None:
    """A heading and rows of so many cells, with strokes between them or without."""
    chance = sheet.chance
    columns = chance.randint(2, max(2, min(6, sheet.width // (6 * sheet.face.size))))
    shares = [chance.uniform(0.6, 1.6) for _ in range(columns)]
    edges = [sheet.margin]
    for share in shares:
        edges.append(edges[-1] + int(sheet.width * share / sum(shares)))
    aligns = [chance.choice(("left", "left", "right", "center")) for _ in shares]
    kinds = [chance.choice((words.amount, words.code, words.item, words.item, words.date)) for _ in shares]
    pad, lined, first = max(2, sheet.face.size // 4), chance.random() < 0.6, sheet.top
    strokes = [first]
    for number in range(most):
        if sheet.full:
            break
        texts = [words.item(chance) if number == 0 else kind(chance) for kind in kinds]
        cells = [
            (left + pad, max(right - left - 2 * pad, 1), text, align)
            for left, right, text, align in zip(edges[:-1], edges[1:], texts, aligns, strict=True)
            if number == 0 or chance.random() < 0.95
        ]
        sheet.cells(cells)
        strokes.append(sheet.top)
        if lined:
            sheet.top += pad // 2 + 2
    if lined:
        wide = chance.randint(1, 2)
        for row in strokes:
            sheet.stroke(edges[0], row, edges[-1] + wide, row + wide)
        for edge in edges:
            sheet.stroke(edge, first, edge + wide, strokes[-1])


def _form(sheet: Sheet) -> Fields:
    """Labels and values, over one another or beside one another, with lines to write on or in boxes."""
    chance, fields = sheet.chance, {}
    company = words.company(chance)
    if written := sheet.row(company, align=chance.choice(("left", "center")), face=sheet.scaled(1.4)):
        fields["company"] = written[0]
    sheet.row(words.phrase(chance, 2), align="center")
    sheet.skip(chance.uniform(0, 1))
    beside, boxed = chance.random() < 0.6, chance.random() < 0.5
    entries = [
        ("", words.phrase(chance, chance.randint(1, 2)), kind(chance))
        for kind in chance.choices((words.code, words.item, words.telephone, words.date, words.amount), k=40)
    ]
    dates = ("DATE", "Date:", "INVOICE DATE", "Date of issue")
    totals = ("TOTAL", "Total:", "AMOUNT DUE", "TOTAL AMOUNT")
    entries.insert(chance.randrange(4), ("date", chance.choice(dates), words.date(chance)))
    entries.insert(chance.randrange(8), ("total", chance.choice(totals), words.amount(chance)))
    for name, label, value in entries:
        if sheet.full:
            break
        shown = _entry(sheet, label, value, beside=beside, boxed=boxed)
        if name and shown == value:
            fields[name] = value
    return fields


def _entry(sheet: Sheet, label: str, value: str, *, beside: bool, boxed: bool) -> str | None:
    """Returns what was written of the value."""
    chance, other = sheet.chance, sheet.other() if sheet.chance.random() < 0.3 else sheet.face
    left, width = sheet.margin, sheet.width
    if beside:
        column = int(width * chance.uniform(0.3, 0.45))
        sheet.put(left, column - sheet.face.size, label, "left", sheet.face)
        left, width = left + column, width - column
    else:
        sheet.cells([(left, width, label, "left")])
        if sheet.full:
            return None
    line = sheet.put(left + 4, width - 8, value, "left", other)
    height = max(other.line_height, sheet.face.line_height)
    if boxed:
        for top in (sheet.top - 2, sheet.top + height + 2):
            sheet.stroke(left, top, left + width, top + 1)
        for edge in (left, left + width):
            sheet.stroke(edge, sheet.top - 2, edge + 1, sheet.top + height + 2)
    elif chance.random() < 0.7:
        sheet.stroke(left, sheet.top + height, left + width, sheet.top + height + 1)
    sheet.top += round(height * chance.uniform(1.3, 1.7))
    return None if line is None else line.text


def _lines(sheet: Sheet) -> Fields:
    chance = sheet.chance
    while not sheet.full:
        em = sheet.text[0] * (sheet.text[1] / sheet.text[0]) ** chance.random()
        other = sheet.other(em)
        if sheet.top + other.line_height > sheet.bottom:
            break
        texts = [words.phrase(chance, chance.randint(1, 4)) for _ in range(chance.choice((1, 1, 2)))]
        sheet.row(*texts, align=chance.choice(("left", "center", "right")), face=other)
    return {}


LAYOUTS: dict[str, tuple[int, Callable[[Sheet], Fields]]] = {
    "receipt": (5, _receipt),
    "document": (2, _document),
    "table": (2, _table_page),
    "form": (2, _form),
    "lines": (3, _lines),
}
"""Kinds of pages -> how often they come among all, and what fills the sheet."""
