"""Files of rows as people have them, written by the libraries that people use, and what those libraries read in them.

VERSIONS.txt has the versions of the libraries that wrote what is checked in (datasets 5.2.0).  Run by

    python tests/golden/data_files/generate.py
"""

import bz2
import gzip
import json
import lzma
import shutil
import sys
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent

ROWS = [
    {"prompt": "name a tree", "chosen": "oak", "rejected": "rock", "score": 1},
    {"prompt": "two lines,\nwith a \"quote\"", "chosen": "naïve café", "rejected": "x;y\tz", "score": 2},
    {"prompt": "über", "chosen": "日本 🌳", "rejected": "", "score": None},
]
MORE = [
    {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}", "score": n} for n in range(5)
]


def fresh(name):
    path = HERE / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True) if path.is_file() else None
    return path


def zstd(part):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(part)
    return sink.getvalue().to_pybytes()


def packed(data):
    lines = (HERE / "rows.jsonl").read_bytes()
    half = lines.index(b"\n") + 1
    # Two members one behind the other, as `cat a.gz b.gz` makes them.
    pairs = [lines[:half], lines[half:]]
    (HERE / "rows.jsonl.gz").write_bytes(b"".join(gzip.compress(part, mtime=0) for part in pairs))
    (HERE / "rows.jsonl.xz").write_bytes(b"".join(lzma.compress(part) for part in pairs))
    (HERE / "rows.jsonl.bz2").write_bytes(b"".join(bz2.compress(part) for part in pairs))
    (HERE / "rows.jsonl.zst").write_bytes(b"".join(zstd(part) for part in pairs))
    data.to_json(HERE / "pandas.jsonl.gz", compression="gzip", force_ascii=False)


def arrow(table):
    with pa.OSFile(str(HERE / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    pyarrow.feather.write_feather(table, HERE / "lz4.feather", compression="lz4")
    pyarrow.feather.write_feather(table, HERE / "zstd.feather", compression="zstd")
    # The ways in which Arrow may keep texts and lists.
    odd = pa.table(
        {
            "prompt": pa.array([row["prompt"] for row in ROWS]).dictionary_encode(),
            "chosen": pa.array([row["chosen"] for row in ROWS], pa.large_string()),
            "rejected": pa.array([row["rejected"] for row in ROWS], pa.string_view()),
            "score": pa.array([row["score"] for row in ROWS], pa.int8()),
            "tags": pa.array([["a"], [], ["b", "c"]], pa.large_list(pa.string())),
        }
    )
    with pa.OSFile(str(HERE / "odd.arrow"), "wb") as sink, pa.ipc.new_stream(sink, odd.schema) as writer:
        writer.write_table(odd)


def shards():
    """Two parts of a split whose columns and fields stand in another order, with other types of the same meaning."""
    folder = fresh("shards")
    folder.mkdir()
    item = pa.struct([("role", pa.string()), ("content", pa.string())])
    messages = lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}!"}]
    first = pa.table(
        {
            "messages": pa.array([messages("a"), messages("b")], pa.list_(pa.field("item", item))),
            "score": pa.array([1, 2], pa.int32()),
        }
    )
    second = pa.table(
        {
            "score": pa.array([3], pa.int64()),
            "messages": pa.array(
                [[{"role": one["role"], "content": one["content"]} for one in messages("c")]],
                pa.large_list(pa.field("element", pa.struct([("content", pa.large_string()), ("role", pa.string())]), False)),
            ),
        }
    )
    pq.write_table(first, folder / "train-00000-of-00002.parquet", use_compliant_nested_type=False)
    pq.write_table(second, folder / "train-00001-of-00002.parquet")


CSVS = {
    "plain": "prompt,chosen\np,c\n",
    "quotes": 'prompt,chosen\n"a,b","say ""hi"""\n',
    "newline in quotes": 'prompt,chosen\n"one\ntwo",c\n',
    "crlf": 'prompt,chosen\r\n"one\r\ntwo",c\r\nq,d\r\n',
    "carriage returns": "prompt,chosen\rp,c\rq,d\r",
    "empty fields": 'prompt,chosen\n,c\np,""\n',
    "blank lines": "prompt,chosen\n\np,c\n\n  \nq,d\n",
    "no newline at the end": "prompt,chosen\np,c",
    "quote inside": 'prompt,chosen\na"b,c "d"\n',
    "text behind a quote": 'prompt,chosen\n"a"b,c\n',
    "spaces": "prompt,chosen\n p , c \n",
    "row numbers": ",prompt,chosen\n0,p,c\n1,q,d\n",
    "byte order mark": "\ufeffprompt,chosen\np,c\n",
}


def read_csv(text):
    path = HERE / "case.csv"
    path.write_bytes(text.encode())
    # As text, because we guess no numbers; otherwise as `datasets` calls it.
    frames = pandas.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    path.unlink()
    return json.loads(frames.to_json(orient="records", force_ascii=False))


def mixes():
    cases = []
    for lengths, probabilities, seed in [
        ([3, 4, 5], None, 1),
        ([30, 20], [0.7, 0.3], 42),
        ([30, 20], [0.7, 0.3], 2**40 + 7),
        ([5, 900, 2000], [0.01, 0.39, 0.6], 0),
        ([1500, 1500], [0.5, 0.5], 3407),
        ([7, 7, 7], [1 / 6, 2 / 6, 3 / 6], 5),
    ]:
        for strategy in ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]:
            parts = [
                datasets.Dataset.from_dict({"from": [number] * length, "row": list(range(length))})
                for number, length in enumerate(lengths)
            ]
            mixed = datasets.interleave_datasets(
                parts, probabilities=probabilities, seed=seed, stopping_strategy=strategy
            )
            order = list(mixed["from"])
            cases.append(
                {
                    "lengths": lengths,
                    "probabilities": probabilities,
                    "seed": seed,
                    "stopping_strategy": strategy,
                    # Run lengths would hide nothing, but digits are as short.
                    "order": "".join(str(number) for number in order),
                    "rows_end": list(mixed["row"])[-5:],
                }
            )
    return cases


def main():
    data = datasets.Dataset.from_list(ROWS)
    (HERE / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    packed(data)
    data.to_csv(HERE / "rows.csv", index=False)
    data.to_csv(HERE / "rows.tsv", index=False, sep="\t")
    text = (HERE / "rows.csv").read_text()
    (HERE / "utf16.csv").write_bytes(text.encode("utf-16"))
    (HERE / "utf16le.csv").write_bytes(text.encode("utf-16-le"))
    western = "".join(line + "\n" for line in ["prompt,chosen", "über,naïve café", "“x”,–"])
    (HERE / "cp1252.csv").write_bytes(western.encode("cp1252"))
    (HERE / "latin1.csv").write_bytes("prompt,chosen\nüber,naïve café\n".encode("latin-1"))
    (HERE / "shift_jis.csv").write_bytes("prompt,chosen\n日本,木\n".encode("shift_jis"))
    arrow(data.data.table.combine_chunks())
    data.save_to_disk(fresh("saved"))
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(MORE), test=data)
    splits.save_to_disk(fresh("saved_dict"), num_shards={"train": 2, "test": 1})
    shards()
    golden = {
        "rows": ROWS,
        "more": MORE,
        "csv": [{"name": name, "text": text, "rows": read_csv(text)} for name, text in CSVS.items()],
        "mixes": mixes(),
    }
    (HERE / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")
    versions = {"python": sys.version.split()[0], "datasets": datasets.__version__, "pyarrow": pa.__version__}
    versions["pandas"] = pandas.__version__
    (HERE / "VERSIONS.txt").write_text("".join(f"{name} {version}\n" for name, version in versions.items()))


if __name__ == "__main__":
    main()
