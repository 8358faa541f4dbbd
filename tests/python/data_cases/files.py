"""Files and folders: what they are packed in, how their text is encoded, and what else lies beside them."""

import bz2
import gzip
import io
import json
import lzma

from .arguments import by_datasets, objects, parquet
from .case import EXACT, TOOLS, Case, assistant, jsonl, lines, refused, user

ROWS = [{"prompt": "hi", "chosen": "oak", "rejected": "a"}, {"prompt": "café?", "chosen": "thé", "rejected": "b"}]
LINES = lines(ROWS)
CSV = "prompt,chosen,rejected\nhi,oak,a\ncafé?,thé,b\n"
PACKED = {"json": ("json", {}), "csv": ("csv", {})}


def zstd(data):
    import pyarrow as pa

    codec = pa.Codec("zstd")
    return codec.compress(data).to_pybytes()


def one(name, file, data, rows=ROWS, loader=None, **more):
    pairs = {"path": file, **more.pop("pairs", {})}
    return Case(name, {file: data}, rows=rows, pairs=pairs, loader=loader, **more)


def no(name, file, data, words, **more):
    return one(name, file, data, None, refused=words, **more)


def packages():
    data = LINES.encode()
    return [
        one("gz", "rows.jsonl.gz", gzip.compress(data, mtime=0), loader=("json", {})),
        one("zst", "rows.jsonl.zst", zstd(data)),
        one("xz", "rows.jsonl.xz", lzma.compress(data), loader=("json", {})),
        one("bz2", "rows.jsonl.bz2", bz2.compress(data), loader=("json", {})),
        one("gz_of_two_parts", "rows.jsonl.gz", gzip.compress(lines(ROWS[:1]).encode(), mtime=0) + gzip.compress(lines(ROWS[1:]).encode(), mtime=0), loader=("json", {})),
        one("gz_of_csv", "rows.csv.gz", gzip.compress(CSV.encode(), mtime=0), loader=("csv", {})),
        one("gz_of_json", "rows.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), loader=("json", {})),
        one("gz_without_its_name", "rows.jsonl", gzip.compress(data, mtime=0), refused=["rows.jsonl", "gzip|gz"]),
        no("gz_cut", "rows.jsonl.gz", gzip.compress(data * 50, mtime=0)[:-20], ["rows.jsonl.gz"]),
        one("gz_that_is_none", "rows.jsonl.gz", data, refused=["rows.jsonl.gz", "gzip|gz"]),
        no("zip", "rows.zip", b"PK\x03\x04" + b"\0" * 40, ["rows.zip"]),
        no("png_as_jsonl", "rows.jsonl", b"\x89PNG\r\n\x1a\n\x1b[31m" + b"\0" * 40, ["rows.jsonl"]),
        no("lfs_pointer", "rows.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n", ["rows.jsonl", "lfs|LFS"]),
        no("lfs_pointer_as_parquet", "rows.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n", ["rows.parquet", "lfs|LFS"]),
        no("html_as_jsonl", "rows.jsonl", "<!DOCTYPE html>\n<html><body>Not found</body></html>\n", ["rows.jsonl", "HTML|web page|JSON"]),
        one("parquet_as_jsonl", "rows.jsonl", by_datasets(ROWS), refused=["rows.jsonl", "Parquet"]),
        one("jsonl_as_parquet", "rows.parquet", LINES, refused=["rows.parquet", "JSON|Parquet"]),
        no("parquet_cut", "rows.parquet", by_datasets(ROWS)[:-30], ["rows.parquet"]),
        no("empty", "rows.jsonl", "", ["rows.jsonl", "no row|empty"]),
        no("only_blank_lines", "rows.jsonl", "\n \n\n", ["rows.jsonl", "no row|empty"]),
        no("empty_list", "rows.json", "[]", ["rows.json", "no row|empty"]),
        no("csv_header_only", "rows.csv", "prompt,chosen,rejected\n", ["rows.csv", "no row|empty"]),
        no("missing", "other.jsonl", LINES, ["rows.jsonl"], pairs={"path": "rows.jsonl"}),
    ]


def encodings():
    latin = "caf\xe9"
    rows = [ROWS[1]]
    text = lines(rows)
    return [
        one("bom", "rows.jsonl", b"\xef\xbb\xbf" + LINES.encode(), loader=("json", {})),
        one("bom_in_json", "rows.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), loader=("json", {})),
        one("bom_in_csv", "rows.csv", b"\xef\xbb\xbf" + CSV.encode(), loader=("csv", {})),
        one("utf16", "rows.jsonl", LINES.encode("utf-16"), refused=["rows.jsonl", "UTF-16|utf-16"]),
        one("utf16_named", "rows.jsonl", LINES.encode("utf-16"), pairs={"encoding": "utf-16"}, loader=("json", {"encoding": "utf-16"})),
        one("utf16_le_named", "rows.jsonl", LINES.encode("utf-16-le"), pairs={"encoding": "utf-16le"}, loader=("json", {"encoding": "utf-16-le"})),
        no("utf16_le_unnamed", "rows.jsonl", LINES.encode("utf-16-le"), ["rows.jsonl", "UTF-8|UTF-16|encoding"]),
        one("utf16_csv_named", "rows.csv", CSV.encode("utf-16"), pairs={"encoding": "utf-16"}, loader=("csv", {"encoding": "utf-16"})),
        one("latin1_named", "rows.jsonl", text.encode("latin-1"), rows, pairs={"encoding": "latin-1"}, loader=("json", {"encoding": "latin-1"})),
        one("latin1_csv_named", "rows.csv", CSV.encode("latin-1"), pairs={"encoding": "latin-1"}, loader=("csv", {"encoding": "latin-1"})),
        no("latin1", "rows.jsonl", text.encode("latin-1"), ["rows.jsonl:1|row 1", "UTF-8", "E9|e9|byte"]),
        no("latin1_csv", "rows.csv", CSV.encode("latin-1"), ["rows.csv", "UTF-8", "E9|e9|byte"]),
        one("windows1252_named", "rows.jsonl", lines([{"prompt": "“hi”", "chosen": "5 €", "rejected": "b"}]).encode("cp1252"), [{"prompt": "“hi”", "chosen": "5 €", "rejected": "b"}], pairs={"encoding": "windows-1252"}, loader=("json", {"encoding": "cp1252"})),
        one("shift_jis_named", "rows.jsonl", lines([{"prompt": "木", "chosen": "はい", "rejected": "b"}]).encode("shift_jis"), [{"prompt": "木", "chosen": "はい", "rejected": "b"}], pairs={"encoding": "shift_jis"}, loader=("json", {"encoding": "shift_jis"})),
        no("encoding_unknown", "rows.jsonl", LINES, ["encoding"], pairs={"encoding": "klingon"}),
        no("encoding_of_parquet", "rows.parquet", by_datasets(ROWS), ["encoding"], pairs={"encoding": "latin-1"}),
        no("encoding_that_does_not_fit", "rows.jsonl", LINES.encode("latin-1"), ["rows.jsonl"], pairs={"encoding": "utf-8"}),
    ]


def json_habits():
    bad = '{"prompt": "x", "chosen": "y", "rejected": "z"'
    pretty = "".join(json.dumps(row, indent=2, ensure_ascii=False) + "\n" for row in ROWS)
    used = '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": "a"}]}\n'
    return [
        one("crlf", "rows.jsonl", LINES.replace("\n", "\r\n"), loader=("json", {})),
        one("no_newline_at_the_end", "rows.jsonl", LINES.rstrip("\n"), loader=("json", {})),
        one("blank_lines", "rows.jsonl", "\n" + LINES.replace("\n", "\n\n  \n"), loader=("json", {})),
        one("several_lines", "rows.jsonl", pretty, loader=("json", {})),
        one("several_lines_one_row", "rows.jsonl", json.dumps(ROWS[1], indent=4), [ROWS[1]], loader=("json", {})),
        one("several_on_a_line", "rows.jsonl", LINES.replace("\n", " "), refused=["rows.jsonl:1"], loader=("json", {})),
        one("list_in_jsonl", "rows.jsonl", json.dumps(ROWS), loader=("json", {})),
        one("list_in_jsonl_indented", "rows.jsonl", json.dumps(ROWS, indent=1), loader=("json", {})),
        one("lines_in_json", "rows.json", LINES, loader=("json", {})),
        one("one_object_in_json", "rows.json", json.dumps(ROWS[0]), ROWS[:1], loader=("json", {})),
        no("rows_below_a_key", "rows.json", json.dumps({"data": ROWS}), ["rows.json", "data"]),
        no("columns_as_lists", "rows.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}), ["rows.json|row 1"]),
        no("trailing_comma", "rows.jsonl", LINES + bad + ",}\n", ["rows.jsonl:3"]),
        no("trailing_comma_in_list", "rows.json", json.dumps(ROWS)[:-1] + ",]", ["rows.json", "comma|expected|]"]),
        no("comma_after_lines", "rows.jsonl", LINES.replace("\n", ",\n"), ["rows.jsonl:1"]),
        no("single_quotes", "rows.jsonl", str(ROWS[0]) + "\n", ["rows.jsonl:1"]),
        no("comment", "rows.jsonl", "// rows\n" + LINES, ["rows.jsonl:1"]),
        no("cut_line", "rows.jsonl", LINES + bad, ["rows.jsonl:3"]),
        no("broken_line_behind_blank_ones", "rows.jsonl", "\n\n" + LINES + "\n" + bad + "\n", ["rows.jsonl:6"]),
        no("line_of_text", "rows.jsonl", LINES + '"hi"\n', ["rows.jsonl:3"]),
        no("line_of_number", "rows.jsonl", LINES + "5\n", ["rows.jsonl:3"]),
        one("null_line", "rows.jsonl", LINES + "null\n", None, refused=["rows.jsonl:3"]),
        one("nan_in_unused", "rows.jsonl", '{"score": NaN, "prompt": "hi", "chosen": "oak", "rejected": "a"}\n' + lines(ROWS[1:]), loader=("json", {})),
        one("infinities_in_unused", "rows.jsonl", '{"score": [Infinity, -Infinity], "prompt": "hi", "chosen": "oak", "rejected": "a"}\n' + lines(ROWS[1:]), loader=("json", {})),
        one("nan_in_unused_below", "rows.jsonl", '{"meta": {"score": NaN}, "prompt": "hi", "chosen": "oak", "rejected": "a"}\n' + lines(ROWS[1:]), loader=("json", {})),
        no("nan_in_used", "rows.jsonl", used % "NaN", ["rows.jsonl:1|row 1", "NaN|content"]),
        no("nan_as_answer", "rows.jsonl", LINES + '{"prompt": "x", "chosen": NaN, "rejected": "z"}\n', ["rows.jsonl:3|row 3", "NaN|chosen"]),
        one("number_out_of_range_in_unused", "rows.jsonl", '{"score": 1e999, "prompt": "hi", "chosen": "oak", "rejected": "a"}\n' + lines(ROWS[1:]), refused=["rows.jsonl:1|row 1"]),
        one("key_twice", "rows.jsonl", '{"prompt": "x", "prompt": "hi", "chosen": "oak", "rejected": "a"}\n' + lines(ROWS[1:]), refused=["rows.jsonl:1|row 1", "prompt"]),
        one("unused_key_twice", "rows.jsonl", '{"x": 1, "x": 2, "prompt": "hi", "chosen": "oak", "rejected": "a"}\n' + lines(ROWS[1:]), refused=["rows.jsonl:1|row 1", "x"]),
        one("long_row", "rows.jsonl", lines([{**ROWS[0], "prompt": "long " * 14_000}]), [{**ROWS[0], "prompt": "long " * 14_000}], loader=("json", {})),
        no("deep_in_unused", "rows.jsonl", '{"x": ' + "[" * 3000 + "]" * 3000 + ', "prompt": "hi", "chosen": "a", "rejected": "b"}\n', ["rows.jsonl:1"]),
        one("types_that_change_in_unused", "rows.jsonl", lines([{**ROWS[0], "meta": 1}, {**ROWS[1], "meta": {"a": ["x"]}}]), loader=("json", {})),
        one("columns_that_come_later", "rows.jsonl", lines([ROWS[0]] * 2000 + [{**ROWS[1], "late": [1]}]), [ROWS[0]] * 2000 + [ROWS[1]], loader=("json", {})),
        one("max_rows", "rows.jsonl", LINES, ROWS[:1], pairs={"max_rows": 1}),
        one("max_rows_reads_no_further", "rows.jsonl", lines(ROWS[:1]) + "broken\n", ROWS[:1], pairs={"max_rows": 1}),
        one("max_rows_of_a_list", "rows.json", json.dumps(ROWS)[:-1] + ", broken", ROWS, pairs={"max_rows": 2}),
        one("max_rows_above", "rows.jsonl", LINES, pairs={"max_rows": 100}),
    ]


def tables():
    semicolons = CSV.replace(",", ";")
    return [
        one("csv", "rows.csv", CSV, loader=("csv", {})),
        one("csv_crlf", "rows.csv", CSV.replace("\n", "\r\n"), loader=("csv", {})),
        one("csv_quotes", "rows.csv", 'prompt,chosen,rejected\n"say ""hi"", then\nstop","a,b",\'c\'\n', [{"prompt": 'say "hi", then\nstop', "chosen": "a,b", "rejected": "'c'"}], loader=("csv", {})),
        one("csv_numbers_are_texts", "rows.csv", "prompt,chosen,rejected\n007,1.0,1e5\n8,true,-0\n", [{"prompt": "007", "chosen": "1.0", "rejected": "1e5"}, {"prompt": "8", "chosen": "true", "rejected": "-0"}], loader=("csv", {})),
        one("csv_words_for_nothing", "rows.csv", "prompt,chosen,rejected\nNA,None,null\nnan,NULL,N/A\n", [{"prompt": "NA", "chosen": "None", "rejected": "null"}, {"prompt": "nan", "chosen": "NULL", "rejected": "N/A"}], loader=("csv", {})),
        one("csv_dates_are_texts", "rows.csv", "prompt,chosen,rejected\n2024-01-01,12:00,1/2\n", [{"prompt": "2024-01-01", "chosen": "12:00", "rejected": "1/2"}], loader=("csv", {})),
        one("csv_spaces_are_kept", "rows.csv", "prompt,chosen,rejected\n hi , oak,a \n", [{"prompt": " hi ", "chosen": " oak", "rejected": "a "}], template=EXACT, loader=("csv", {})),
        no("csv_empty_cell", "rows.csv", "prompt,chosen,rejected\nhi,oak,a\nhi,,a\n", ["row 2|rows.csv:3", "chosen"]),
        no("csv_too_few_cells", "rows.csv", "prompt,chosen,rejected\nhi,oak,a\nhi,oak\n", ["row 2|rows.csv:3"]),
        no("csv_too_many_cells", "rows.csv", "prompt,chosen,rejected\nhi,oak,a,b\n", ["row 1|rows.csv:2"]),
        no("csv_open_quote", "rows.csv", 'prompt,chosen,rejected\n"hi,oak,a\n', ["rows.csv", "quot"]),
        no("csv_column_twice", "rows.csv", "prompt,chosen,chosen\nhi,oak,a\n", ["rows.csv", "chosen"]),
        one("csv_unused_column_without_a_name", "rows.csv", ",prompt,chosen,rejected\n0,hi,oak,a\n", ROWS[:1], loader=("csv", {})),
        one("csv_blank_lines", "rows.csv", CSV.replace("\n", "\n\n"), loader=("csv", {})),
        one("tsv", "rows.tsv", CSV.replace(",", "\t"), loader=("csv", {"sep": "\t"})),
        one("delimiter", "rows.csv", semicolons, pairs={"delimiter": ";"}, loader=("csv", {"sep": ";"})),
        one("delimiter_bar", "rows.csv", CSV.replace(",", "|"), pairs={"delimiter": "|"}, loader=("csv", {"sep": "|"})),
        one("delimiter_of_txt", "rows.txt", CSV.replace(",", "\t"), pairs={"delimiter": "\t", "format": "csv"}),
        no("delimiter_untold", "rows.csv", semicolons, ["rows.csv|columns", ";|delimiter"]),
        no("delimiter_of_two", "rows.csv", semicolons, ["delimiter"], pairs={"delimiter": ";;"}),
        no("delimiter_of_jsonl", "rows.jsonl", LINES, ["delimiter"], pairs={"delimiter": ";"}),
    ]


def folder(name, files, rows=None, **more):
    files = {f"data/{path}": data for path, data in files.items()}
    pairs = {"path": more.pop("path", "data"), **more.pop("pairs", {})}
    more.setdefault("loader", None)
    return Case(name, files, rows=rows, pairs=pairs, **more)


def folders():
    import pyarrow as pa

    first, second = lines(ROWS[:1]), lines(ROWS[1:])
    mixed = objects('{"a": "noon"}', '{"a": 5, "b": {}}', '{"a": [1, 2.5]}')
    messages = lambda order, **more: pa.array([[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "oak"}]], pa.list_(pa.field(more.get("item", "element"), pa.struct([pa.field(name, pa.string(), more.get("null", True)) for name in order]))))
    shard = lambda order, **more: parquet(pa.table({"messages": messages(order, **more), "n": pa.array([1], more.get("width", pa.int64()))}))
    oak = {"messages": [user("hi"), assistant("oak")]}
    shards = lambda a, b: {"train-00000-of-00002.parquet": a, "train-00001-of-00002.parquet": b}
    plain = ["role", "content"]
    return [
        Case("two_files", {"a.jsonl": first, "b.jsonl": second}, rows=ROWS, pairs={"path": ["a.jsonl", "b.jsonl"]}, loader=("json", {"data_files": ["a.jsonl", "b.jsonl"]})),
        Case("two_files_in_the_order_given", {"a.jsonl": first, "b.jsonl": second}, rows=ROWS[::-1], pairs={"path": ["b.jsonl", "a.jsonl"]}, loader=("json", {"data_files": ["b.jsonl", "a.jsonl"]})),
        Case("two_formats", {"a.jsonl": first, "b.csv": "prompt,chosen,rejected\ncafé?,thé,b\n"}, rows=ROWS, pairs={"path": ["a.jsonl", "b.csv"]}, refused=["b.csv"], loader=None),
        Case("glob", {"part-1.jsonl": first, "part-2.jsonl": second, "other.jsonl": "broken"}, rows=ROWS, pairs={"path": "part-*.jsonl"}, loader=("json", {"data_files": ["part-*.jsonl"]})),
        Case("glob_of_nothing", {"rows.jsonl": first}, refused=["part-*.jsonl"], pairs={"path": "part-*.jsonl"}, loader=None),
        Case("glob_of_folders", {"a/rows.jsonl": first, "b/rows.jsonl": second}, rows=ROWS, pairs={"path": "*/rows.jsonl"}, loader=None),
        Case("two_files_one_lacks_a_column", {"a.jsonl": first, "b.jsonl": lines([{**ROWS[1], "score": 5}])}, rows=ROWS, pairs={"path": ["a.jsonl", "b.jsonl"]}, loader=None),
        Case("two_files_of_other_forms", {"a.jsonl": lines([oak]), "b.jsonl": lines([{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "oak"}]}])}, rows=[oak, oak], pairs={"path": ["a.jsonl", "b.jsonl"]}, refused=["b.jsonl"], loader=None),
        Case("two_files_max_rows", {"a.jsonl": first, "b.jsonl": "broken\n"}, rows=ROWS[:1], pairs={"path": ["a.jsonl", "b.jsonl"], "max_rows": 1}, loader=None),
        Case("second_file_broken", {"a.jsonl": first, "b.jsonl": "broken\n"}, refused=["b.jsonl:1"], pairs={"path": ["a.jsonl", "b.jsonl"]}, loader=None),
        folder("splits", {"train.jsonl": LINES, "test.jsonl": first}, ROWS, holds={"counts": {"train": 2, "test": 1}}),
        folder("splits_in_folders", {"train/a.jsonl": LINES, "test/a.jsonl": first}, ROWS, holds={"counts": {"train": 2, "test": 1}}, refused=["data"]),
        folder("split_named_validation", {"train.jsonl": LINES, "validation.jsonl": first}, ROWS, holds={"counts": {"train": 2, "validation": 1}}),
        folder("split_in_two_formats", {"train.jsonl": LINES, "train.csv": CSV}, ROWS, told=["csv|jsonl"], refused=["train.csv", "train.jsonl"]),
        folder("split_in_json_and_jsonl", {"train.jsonl": LINES, "train.json": json.dumps(ROWS)}, ROWS, told=["json"], refused=["train.json"]),
        folder("split_packed_and_not", {"train.jsonl": LINES, "train.jsonl.gz": gzip.compress(LINES.encode(), mtime=0)}, ROWS, told=["gz"], refused=["train.jsonl"]),
        folder("metadata_beside", {"train.jsonl": LINES, "README.md": "# Rows\n", "dataset_info.json": "{}", ".gitattributes": "*.jsonl filter=lfs\n", "LICENSE": "free\n", ".DS_Store": "\0"}, ROWS),
        folder("json_metadata_beside", {"train.csv": CSV, "dataset_infos.json": "{}", "metadata.jsonl": "{}\n"}, ROWS, refused=["metadata.jsonl"]),
        folder("shards", {"train-00000-of-00002.jsonl": first, "train-00001-of-00002.jsonl": second}, ROWS),
        folder("shard_missing", {"train-00000-of-00002.jsonl": first}, refused=["00001-of-00002|00002"]),
        folder("shards_of_ten", {f"train-{n}.jsonl": lines([{**ROWS[0], "prompt": str(n)}]) for n in range(11)}, [{**ROWS[0], "prompt": str(n)} for n in range(11)], readings=[[{**ROWS[0], "prompt": str(n)} for n in sorted(range(11), key=str)]]),
        folder("shards_fields_in_other_order", shards(shard(plain), shard(plain[::-1])), [oak, oak]),
        folder("shards_nullability", shards(shard(plain), shard(plain, null=False)), [oak, oak]),
        folder("shards_list_field", shards(shard(plain), shard(plain, item="item")), [oak, oak]),
        folder("shards_integer_width", shards(shard(plain), shard(plain, width=pa.int32())), [oak, oak]),
        folder("shards_one_has_more_fields", shards(shard(plain), shard([*plain, "name"])), [oak, oak], refused=["train-00001|name"]),
        folder("shards_text_and_large_text", {"train-00000-of-00002.parquet": parquet(pa.table({name: pa.array([ROWS[0][name]], pa.string()) for name in ROWS[0]})), "train-00001-of-00002.parquet": parquet(pa.table({name: pa.array([ROWS[1][name]], pa.large_string()) for name in ROWS[0]}))}, ROWS),
        folder("folder_without_data", {"README.md": "# Rows\n"}, refused=["data"]),
        Case("two_files_of_other_types", {"a.jsonl": lines(mixed[:1]), "b.jsonl": lines(mixed[1:])}, rows=mixed, pairs={"path": ["a.jsonl", "b.jsonl"]}, template=TOOLS, loader=None),
        folder("splits_of_other_types", {"train.jsonl": lines(mixed[:2]), "test.jsonl": lines(mixed[2:])}, mixed[:2], template=TOOLS, holds={"counts": {"train": 2, "test": 1}}),
        folder("shards_of_other_types", {"train-00000-of-00002.parquet": by_datasets(mixed[:1]), "train-00001-of-00002.parquet": by_datasets(mixed[1:])}, mixed, template=TOOLS),
        saved("saved_to_disk_mixed", mixed, template=TOOLS),
        one("gz_of_mixed", "rows.jsonl.gz", gzip.compress(lines(mixed).encode(), mtime=0), mixed, template=TOOLS),
        saved("saved_to_disk", ROWS),
        saved("saved_to_disk_in_shards", ROWS * 5, num_shards=3),
        arrow("arrow_file", False),
        arrow("arrow_stream", True),
        Case("datasets_of_two", {"a.jsonl": first, "b.jsonl": second}, rows=ROWS, readings=[ROWS[::-1]], pairs={"path": None, "datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}, loader=None),
    ]


def saved(name, rows, template=None, **more):
    import tempfile
    from pathlib import Path

    import datasets

    with tempfile.TemporaryDirectory() as place:
        datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(place, **more)
        files = {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}
    # What differs from one writing to the next is no part of the case.
    state = json.loads(files["state.json"])
    state["_fingerprint"] = "0" * 16
    files["state.json"] = json.dumps(state, indent=2)
    return folder(name, files, rows, template=template, loader=("disk", {"path": "data"}))


def arrow(name, stream):
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    out = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table)
    return one(name, "rows.arrow", out.getvalue(), loader=("arrow", {}))


def cases():
    return [(packages(), "packed and other files"), (encodings(), "encodings"), (json_habits(), "habits of JSON"), (tables(), "tables of text"), (folders(), "several files, folders")]
