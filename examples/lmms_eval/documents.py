"""What questions.yaml asks of a row of questions.parquet."""


def images(row):
    return [image.convert("RGB") for image in row["images"]]
