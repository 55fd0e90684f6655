"""Questions as `stepwell evaluate` takes them -> questions.parquet, which holds their images too.

python make_parquet.py QUESTIONS.jsonl [HOW_MANY]
"""

import sys
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

from stepwell.evaluate.rows import read_rows

limit = int(sys.argv[2]) if len(sys.argv) > 2 else None
rows = [
    {
        "images": [{"bytes": Path(image).read_bytes()} for image in row.images],
        "question": row.question,
        "answers": list(row.answers),
    }
    for row in read_rows(sys.argv[1], limit=limit)
]
features = Features({"images": List(Image()), "question": Value("string"), "answers": List(Value("string"))})
Dataset.from_list(rows, features=features).to_parquet("questions.parquet")
