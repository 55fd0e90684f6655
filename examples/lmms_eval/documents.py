"""What questions.yaml asks of a row of questions.parquet, and of its answer."""

from stepwell.evaluate.metrics import anls


def images(row):
    return [image.convert("RGB") for image in row["images"]]


def scores(row, results):
    """As `stepwell evaluate` scores; lmms-eval's own `anls` leaves blanks between words aside."""
    return {"anls": anls(results[0], row["answers"])}
