"""Arguments of tool calls and the like: below a message, JSON stays what it was."""

import io
import json

from .case import TOOLS, Case, assistant, jsonl, lines, user

# The value as JSON text, by name.
VALUES = {
    "noon": '{"time": "noon"}',
    "integer": '{"time": 1690876800}',
    "mixed_list": '{"a": [1, 2.5, true]}',
    "list_of_all": '{"a": [null, "x", 1, {}, [], {"b": [1.0]}]}',
    "empty_object": "{}",
    "empty_list": '{"a": []}',
    "empty_objects_within": '{"a": {}, "b": {"c": {}}, "d": [{}]}',
    "null": '{"a": null}',
    "nulls_within": '{"a": {"b": null, "c": [null]}, "d": 1}',
    "above_i64": '{"a": 9223372036854775808}',
    "highest_i64": '{"a": 9223372036854775807}',
    "lowest_i64": '{"a": -9223372036854775808}',
    "below_i64": '{"a": -9223372036854775809}',
    "above_u64": '{"a": 18446744073709551617}',
    "thirty_digits": '{"a": 123456789012345678901234567890}',
    "one": '{"a": 1}',
    "one_as_float": '{"a": 1.0}',
    "exponent": '{"a": 1e5}',
    "exponent_capital": '{"a": 1E+5}',
    "exponent_small": '{"a": 1e-7}',
    "exponent_16": '{"a": 1e16}',
    "exponent_22": '{"a": 1e22}',
    "tenth": '{"a": 0.1}',
    "third": '{"a": 0.3333333333333333}',
    "many_digits": '{"a": 3.14159265358979323846264338327950288}',
    "trailing_zeros": '{"a": 2.50}',
    "minus_zero": '{"a": -0, "b": -0.0}',
    "smallest": '{"a": 5e-324}',
    "greatest": '{"a": 1.7976931348623157e308}',
    "below_smallest": '{"a": 1e-400}',
    "booleans": '{"a": true, "b": false}',
    "text_that_looks_like_a_number": '{"a": "5", "b": "1.0", "c": "true", "d": "null"}',
    "text_that_looks_like_json": '{"a": "{}", "b": "[1]"}',
    "date": '{"a": "2024-01-01T00:00:00Z", "b": "2024-01-01"}',
    "escapes": '{"a": "caf\\u00e9 \\u4e2d \\ud83d\\ude00 \\u2028 \\/ \\" \\\\ \\n"}',
    "markup": '{"a": "<b>&amp;\'</b>"}',
    "control": '{"a": "\\u0001\\u001f\\u007f"}',
    "key_order": '{"b": 3, "a": 4}',
    "odd_keys": '{"": 1, "a.b": 2, "c d": 3, "\\u00e9": 4, "\\"": 5}',
    "keys_that_are_numbers": '{"10": 1, "9": 2, "1": 3}',
    "deep": '{"a": ' + "[" * 40 + "1" + "]" * 40 + "}",
    "lists_of_lists": '{"a": [[1, 2], ["x"], [], [[true]]]}',
    "objects_that_differ": '{"a": [{"b": 1}, {"c": "x"}, {"b": "y", "c": null}]}',
    "list_itself": '[1, "a"]',
    "text_itself": '"{\\"a\\": 1}"',
    "text_with_spaces": '"{ \\"a\\":1,   \\"b\\":[ ] }"',
    "number_itself": "5",
    "null_itself": "null",
}
PLAIN = '{"time": "noon"}'


def row(arguments):
    return '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": %s}}]}]}\n' % arguments


def objects(*arguments):
    return [json.loads(row(text)) for text in arguments]


def parquet(table):
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def by_datasets(rows, **more):
    """The Parquet file that datasets writes of rows."""
    import datasets

    out = io.BytesIO()
    datasets.Dataset.from_list(rows, on_mixed_types="use_json", **more).to_parquet(out)
    return out.getvalue()


def in_parquet(name, rows, content=None, nulls=True, **more):
    """Rows in a Parquet file of datasets', meant as they are, or as datasets gives them back (with nulls for absent keys)."""
    import datasets
    import tempfile

    content = content or by_datasets(rows)
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/rows.parquet", "wb") as file:
            file.write(content)
        back = list(datasets.load_dataset("parquet", data_files=folder + "/rows.parquet", split="train", cache_dir=folder))
    more.setdefault("loader", ("parquet", {}))
    readings = [back] if nulls and back != rows else []
    return Case(name, {"rows.parquet": content}, rows=rows, readings=readings, pairs={"path": "rows.parquet"}, template=TOOLS, **more)


def alone():
    """Each value in a row of its own, twice: whatever a column's type is, it fits this value."""
    cases = []
    for name, text in VALUES.items():
        # Python's json has no limit for the number of digits that matter here, and reads 1e-400 as 0.
        cases.append(jsonl(f"all_{name}", row(text) * 2, template=TOOLS))
    cases.append(jsonl("all_above_floats", row('{"a": 1e400}'), template=TOOLS, rows=None, refused=["jsonl:1|row 1"]))
    cases.append(jsonl("all_same_key_twice", row('{"a": 1, "a": 2}'), template=TOOLS, refused=["jsonl:1|row 1", "a"]))
    cases.append(jsonl("all_too_deep", row('{"a": ' + "[" * 2000 + "]" * 2000 + "}"), template=TOOLS, rows=None, refused=["jsonl:1|row 1", "nested|deep"]))
    return cases


def beside():
    """Values beside others: a column's type fits only one of them."""
    couples = [
        ("text_then_number", ["noon", "integer"]), ("number_then_text", ["integer", "noon"]), ("integer_then_float", ["one", "tenth"]), ("integer_then_its_float", ["one", "one_as_float"]),
        ("integer_then_great", ["one", "above_u64"]), ("empty_then_full", ["empty_object", "noon"]), ("full_then_empty", ["noon", "empty_object"]), ("null_then_full", ["null", "one"]),
        ("keys_then_other_order", ["objects_that_differ", "key_order"]), ("object_then_text", ["noon", "text_itself"]), ("text_then_object", ["text_itself", "noon"]),
        ("object_then_list", ["noon", "list_itself"]), ("boolean_then_number", ["booleans", "one"]), ("list_then_object", ["empty_list", "empty_objects_within"]),
        ("text_then_null", ["noon", "null_itself"]), ("dates_then_text", ["date", "noon"]), ("all_of_them", list(VALUES)),
    ]
    cases = [jsonl(f"mixed_{name}", "".join(row(VALUES[value]) for value in values), template=TOOLS) for name, values in couples]
    order = row('{"a": 1, "b": 2}') + row('{"b": 3, "a": 4}')
    cases.append(jsonl("mixed_key_order", order, template=TOOLS))
    some = json.loads(row(PLAIN))
    missing = json.loads(row(PLAIN))
    del missing["messages"][1]["tool_calls"][0]["function"]["arguments"]
    cases.append(jsonl("mixed_arguments_missing", [some, missing], template=TOOLS.replace("c.function.arguments | tojson", "(c.function.arguments | tojson if c.function.arguments is defined else 'none')")))
    two = json.loads(row(PLAIN))
    two["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in [("f", {"a": 1}), ("g", {"a": "x", "b": {}}), ("h", "{}")]]
    cases.append(jsonl("mixed_in_one_message", [two, some], template=TOOLS))
    # The type changes only far behind the rows that a reader looks at first.
    many = row(PLAIN) * 3000 + row('{"time": 5}')
    cases.append(jsonl("mixed_late", many, template=TOOLS))
    return cases


def in_files():
    """The same in other formats."""
    import datasets
    import pyarrow as pa

    mixed = objects(VALUES["noon"], VALUES["integer"])
    alike = objects('{"a": 1, "b": "x"}', '{"a": 2, "b": "y"}')
    apart = objects('{"a": 1}', '{"b": 2}')
    contents = [{"messages": [user("name a fruit"), assistant("pear")]}, {"messages": [user([{"type": "text", "text": "hi"}]), assistant("oak")]}]
    flat = [{"messages": user_row["messages"]} for user_row in [{"messages": [user("name a fruit"), assistant("pear")]}, {"messages": [user("hi"), assistant("oak")]}]]
    texts = [{"prompt": "name a fruit", "chosen": "pear", "rejected": "5"}, {"prompt": "hi", "chosen": 'o"ak', "rejected": "true"}]
    json_column = datasets.Features({"prompt": datasets.Json(), "chosen": datasets.Json(), "rejected": datasets.Value("string")})
    tools = [{"messages": flat[0]["messages"], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]},
             {"messages": flat[0]["messages"], "tools": [{"type": "function", "function": {"name": "g", "parameters": {"a": "x"}}}]}]
    # datasets' writer of JSON keeps ten digits of a float and no sign of a zero, and writes a message with a very great integer as
    # the text of its JSON, so that such values are not in the file.
    lost = ("below_i64", "above_u64", "thirty_digits", "third", "many_digits", "minus_zero", "greatest", "null_itself")
    every = objects(*[text for name, text in VALUES.items() if name not in lost])
    whole_json = datasets.Features({"messages": datasets.Json()})
    list_json = datasets.Features({"messages": datasets.List(datasets.Json())})
    csv = "messages\n" + "".join('"' + json.dumps(item["messages"]).replace('"', '""') + '"\n' for item in mixed)
    return [
        in_parquet("parquet_alike", alike),
        in_parquet("parquet_absent_keys", apart),
        in_parquet("parquet_mixed", mixed),
        # datasets gives a message back as its JSON text where an integer in it is too great for its reader.
        in_parquet("parquet_every_value", every, by_datasets(every, features=list_json), nulls=False),
        in_parquet("parquet_messages_as_json", mixed, by_datasets(mixed, features=whole_json)),
        in_parquet("parquet_messages_as_list_of_json", mixed, by_datasets(mixed, features=list_json)),
        Case("parquet_mixed_content", {"rows.parquet": by_datasets(contents)}, rows=flat, pairs={"path": "rows.parquet"}, loader=("parquet", {})),
        Case("parquet_json_texts", {"rows.parquet": by_datasets(texts, features=json_column)}, rows=texts, pairs={"path": "rows.parquet"}, loader=("parquet", {})),
        Case("parquet_large_texts", {"rows.parquet": parquet(pa.table({name: pa.array([item[name] for item in texts], pa.large_string()) for name in texts[0]}))}, rows=texts, pairs={"path": "rows.parquet"}, loader=("parquet", {})),
        Case("parquet_text_views", {"rows.parquet": parquet(pa.table({name: pa.array([item[name] for item in texts], pa.string_view()) for name in texts[0]}))}, rows=texts, pairs={"path": "rows.parquet"}, loader=("parquet", {})),
        Case("parquet_dictionary", {"rows.parquet": parquet(pa.table({name: pa.array([item[name] for item in texts]).dictionary_encode() for name in texts[0]}))}, rows=texts, pairs={"path": "rows.parquet"}, loader=("parquet", {})),
        in_parquet("parquet_tools", tools),
        Case("parquet_json_as_plain_text", {"rows.parquet": parquet(pa.table({"messages": [json.dumps(item["messages"]) for item in mixed]}))}, rows=mixed, refused=["messages", "text"], pairs={"path": "rows.parquet"}, template=TOOLS, loader=None),
        Case("json_list", {"rows.json": json.dumps(mixed)}, rows=mixed, pairs={"path": "rows.json"}, template=TOOLS),
        Case("json_list_indented", {"rows.json": json.dumps(mixed, indent=2)}, rows=mixed, pairs={"path": "rows.json"}, template=TOOLS),
        Case("csv_of_json", {"rows.csv": csv}, rows=mixed, refused=["messages", "text"], pairs={"path": "rows.csv"}, template=TOOLS, loader=None),
    ]


def cases():
    return [(alone(), "arguments alone"), (beside(), "arguments mixed"), (in_files(), "arguments in files")]
