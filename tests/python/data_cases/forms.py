"""The forms that data sets have: ShareGPT, Alpaca, preferences, transcripts and the rest."""

import json

from .case import EXACT, TOOLS, Case, assistant, jsonl, lines, refused, system, user

HI = [user("hi"), assistant("oak")]


def share(*turns):
    return [{"from": who, "value": text} for who, text in turns]


def pair(prompt="hi", chosen="a", rejected="b"):
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def sharegpt():
    row = {"conversations": share(("human", "hi"), ("gpt", "oak"))}
    meant = {"messages": HI}
    call = {"name": "clock", "arguments": {"zone": "UTC"}}
    return [
        jsonl("sharegpt", [row], rows=[meant]),
        jsonl("sharegpt_named", [row], rows=[meant], pairs={"format": "sharegpt"}),
        jsonl("sharegpt_told", [row], rows=[meant], told=["ShareGPT|sharegpt"]),
        jsonl("sharegpt_system_turn", [{"conversations": share(("system", "Be brief."), ("human", "hi"), ("gpt", "oak"))}, row], rows=[{"messages": [system("Be brief."), *HI]}, meant]),
        jsonl("sharegpt_system_column", [{"system": "Be brief.", **row}, {"system": "", **row}], rows=[{"messages": [system("Be brief."), *HI]}, meant]),
        jsonl("sharegpt_with_ids", [{"id": "x1", **row}], rows=[meant], told=["id"]),
        jsonl("sharegpt_turns", [{"conversations": share(("human", "one"), ("gpt", "1"), ("human", "two"), ("gpt", "2"))}], rows=[{"messages": [user("one"), assistant("1"), user("two"), assistant("2")]}]),
        jsonl("sharegpt_user_assistant", [{"conversations": share(("user", "hi"), ("assistant", "oak"))}], rows=[meant]),
        jsonl("sharegpt_capitals", [{"conversations": share(("Human", "hi"), ("GPT", "oak"))}], rows=[meant], refused=["row 1|jsonl:1", "Human"]),
        jsonl("sharegpt_tool", [{"conversations": share(("human", "time?"), ("gpt", "looking"), ("tool", "12:00"), ("gpt", "noon"))}], rows=[{"messages": [user("time?"), assistant("looking"), {"role": "tool", "content": "12:00"}, assistant("noon")]}], template=TOOLS),
        jsonl("sharegpt_observation", [{"conversations": share(("human", "time?"), ("function_call", json.dumps(call)), ("observation", "12:00"), ("gpt", "noon")), "tools": json.dumps([{"type": "function", "function": {"name": "clock"}}])}],
              rows=[{"messages": [user("time?"), assistant(None, tool_calls=[{"type": "function", "function": call}]), {"role": "tool", "content": "12:00"}, assistant("noon")], "tools": [{"type": "function", "function": {"name": "clock"}}]}], refused=["row 1|jsonl:1", "function_call"], template=TOOLS),
        refused("sharegpt_broken_call", [{"conversations": share(("human", "time?"), ("function_call", "{oops"), ("observation", "12"), ("gpt", "noon"))}], ["row 1|jsonl:1", "call"], template=TOOLS),
        refused("sharegpt_unknown_role", [row, {"conversations": share(("narrator", "hi"), ("gpt", "oak"))}], ["row 2|jsonl:2", "narrator"]),
        refused("sharegpt_null_value", [row, {"conversations": share(("human", None), ("gpt", "oak"))}], ["row 2|jsonl:2", "value|content"]),
        refused("sharegpt_no_value", [row, {"conversations": [{"from": "human"}, {"from": "gpt", "value": "oak"}]}], ["row 2|jsonl:2", "value|content"]),
        refused("sharegpt_null_from", [row, {"conversations": share((None, "hi"), ("gpt", "oak"))}], ["row 2|jsonl:2", "from|role"]),
        refused("sharegpt_empty", [row, {"conversations": []}], ["row 2|jsonl:2", "conversations|messages|empty"]),
        refused("sharegpt_gpt_first", [row, {"conversations": share(("gpt", "hello"))}], ["row 2|jsonl:2", "prompt|human|user|question"]),
        jsonl("sharegpt_gpt_speaks_first", [{"conversations": share(("gpt", "hello"), ("human", "hi"), ("gpt", "oak"))}], rows=[{"messages": [assistant("hello"), *HI]}], refused=["row 1|jsonl:1"]),
        jsonl("sharegpt_human_last", [row, {"conversations": share(("human", "hi"), ("gpt", "oak"), ("human", "more"))}], rows=[meant, meant], told=["1|row 2"], refused=["row 2|jsonl:2", "answer|assistant|gpt"]),
        jsonl("sharegpt_weights", [{"conversations": [{"from": "human", "value": "hi", "weight": 0}, {"from": "gpt", "value": "oak", "weight": 1}]}], rows=[meant], told=["weight"], refused=["weight"]),
        jsonl("sharegpt_mixed_with_messages", [row, {"conversations": HI}], rows=[meant, meant], refused=["row 2|jsonl:2"]),
        jsonl("sharegpt_conversation", [{"conversation": share(("human", "hi"), ("gpt", "oak"))}], rows=[meant], refused=["conversation", "columns"]),
        jsonl("sharegpt_renamed", [{"dialog": share(("human", "hi"), ("gpt", "oak"))}], rows=[meant], pairs={"columns": {"messages": "dialog"}}),
        jsonl("sharegpt_renamed_and_named", [{"dialog": share(("human", "hi"), ("gpt", "oak"))}], rows=[meant], pairs={"columns": {"conversations": "dialog"}, "format": "sharegpt"}, refused=["columns|dialog"]),
        jsonl("sharegpt_as_text", [{"conversations": json.dumps(share(("human", "hi"), ("gpt", "oak")))}], rows=[meant], refused=["row 1|jsonl:1", "conversations"]),
        jsonl("sharegpt_pair", [{"conversations": share(("human", "hi")), "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}], rows=[pair()]),
        jsonl("sharegpt_pair_lists", [{"conversations": share(("human", "hi")), "chosen": share(("gpt", "a")), "rejected": share(("gpt", "b"))}], rows=[pair()]),
        jsonl("sharegpt_in_preferences", [{"prompt": share(("human", "hi")), "chosen": share(("gpt", "a")), "rejected": share(("gpt", "b"))}], rows=[pair()]),
        jsonl("sharegpt_whole_in_preferences", [{"chosen": share(("human", "hi"), ("gpt", "a")), "rejected": share(("human", "hi"), ("gpt", "b"))}], rows=[pair()]),
        jsonl("human_in_preferences", [pair(), {"chosen": [{"role": "Human", "content": "hi"}, assistant("a")], "rejected": [{"role": "Human", "content": "hi"}, assistant("b")], "prompt": None}], rows=None, refused=["row 2|jsonl:2"]),
        Case("sharegpt_json", {"rows.json": json.dumps([row, row])}, rows=[meant, meant], pairs={"path": "rows.json"}),
    ]


def alpaca():
    def row(instruction="add", text="2 3", output="5", **more):
        return {"instruction": instruction, "input": text, "output": output, **more}

    def meant(prompt="add\n\n2 3", answer="5", before=()):
        return {"messages": [*before, user(prompt), assistant(answer)]}

    return [
        jsonl("alpaca", [row()], rows=[meant()]),
        jsonl("alpaca_named", [row()], rows=[meant()], pairs={"format": "alpaca"}),
        jsonl("alpaca_told", [row()], rows=[meant()], told=["Alpaca|alpaca"]),
        jsonl("alpaca_empty_input", [row(text=""), row()], rows=[meant("add"), meant()]),
        jsonl("alpaca_null_input", [row(text=None), row()], rows=[meant("add"), meant()]),
        jsonl("alpaca_input_of_spaces", [row(text="  ")], rows=[meant("add")], readings=[[meant("add\n\n  ")]]),
        jsonl("alpaca_no_input", [{"instruction": "say five", "output": "5"}], rows=[meant("say five")]),
        jsonl("alpaca_input_in_some_rows", [{"instruction": "say five", "output": "5"}, row()], rows=[meant("say five"), meant()]),
        jsonl("alpaca_system", [row(system="Be brief."), row(system="")], rows=[meant(before=[system("Be brief.")]), meant()]),
        jsonl("alpaca_history", [row(history=[["say one", "1"], ["say two", "2"]]), row(history=[])], rows=[meant(before=[user("say one"), assistant("1"), user("say two"), assistant("2")]), meant()], refused=["history"]),
        jsonl("alpaca_text_column", [row(text_="x") | {"text": "Below is an instruction. add 2 3 5"}], rows=[meant()], told=["text"], refused=["text"]),
        jsonl("alpaca_exact", [row("add ", " 2 3")], rows=[meant("add \n\n 2 3")], template=EXACT),
        jsonl("alpaca_columns", [row()], rows=[meant()], pairs={"columns": {"prompt": "instruction", "chosen": "output"}}, readings=[([meant("add")], ["input"])], refused=["input"]),
        jsonl("alpaca_columns_joined", [row(), row("sum", "4 5", "9")], rows=[meant(), meant("sum\n\n4 5", "9")], pairs={"columns": {"prompt": "${instruction}\n\n${input}", "chosen": "output"}}),
        jsonl("alpaca_pair", [{"instruction": "add", "input": "2 3", "chosen": "5", "rejected": "6"}], rows=[pair("add\n\n2 3", "5", "6")]),
        jsonl("alpaca_response", [{"instruction": "say five", "context": "", "response": "5", "category": "x"}], rows=[meant("say five")], refused=["context", "columns"]),
        refused("alpaca_null_instruction", [row(), row(instruction=None)], ["row 2|jsonl:2", "instruction|prompt"]),
        refused("alpaca_null_output", [row(), row(output=None)], ["row 2|jsonl:2", "output|chosen|answer"]),
        refused("alpaca_number", [row(), row(output=5)], ["row 2|jsonl:2", "output|chosen"]),
        jsonl("alpaca_empty_output", [row(output="")], rows=[meant(answer="")], refused=["row 1|jsonl:1", "output|chosen|answer"]),
        Case("alpaca_csv", {"rows.csv": 'instruction,input,output\nadd,2 3,5\nsay five,,5\n'}, rows=[meant(), meant("say five")], pairs={"path": "rows.csv"}, loader=None),
        Case("alpaca_json", {"rows.json": json.dumps([row(), row(text="")], indent=1)}, rows=[meant(), meant("add")], pairs={"path": "rows.json"}),
    ]


def preferences():
    whole = lambda answer: [user("hi"), assistant(answer)]
    return [
        jsonl("pair_texts", [{"prompt": "hi", "chosen": "a", "rejected": "b"}]),
        jsonl("pair_texts_with_system", [{"system": "Be brief.", "prompt": "hi", "chosen": "a", "rejected": "b"}]),
        jsonl("pair_messages", [pair()]),
        jsonl("pair_one_object", [{"prompt": [user("hi")], "chosen": assistant("a"), "rejected": assistant("b")}], rows=[pair()]),
        jsonl("pair_one_object_and_text", [{"prompt": "hi", "chosen": assistant("a"), "rejected": assistant("b")}], rows=[pair()]),
        jsonl("pair_prompt_one_object", [{"prompt": user("hi"), "chosen": [assistant("a")], "rejected": [assistant("b")]}], rows=[pair()]),
        jsonl("pair_text_prompt", [{"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}], rows=[pair()]),
        jsonl("pair_implicit", [{"chosen": whole("a"), "rejected": whole("b")}]),
        jsonl("pair_implicit_turns", [{"chosen": [user("hi"), assistant("x"), user("so?"), assistant("a")], "rejected": [user("hi"), assistant("x"), user("so?"), assistant("b")]}]),
        jsonl("pair_implicit_early", [{"chosen": [user("hi"), assistant("a"), user("so?"), assistant("c")], "rejected": [user("hi"), assistant("b"), user("so?"), assistant("d")]}]),
        jsonl("pair_implicit_and_text_prompt", [{"prompt": "hi", "chosen": whole("a"), "rejected": whole("b")}], rows=[pair()]),
        jsonl("pair_whole_and_messages_prompt", [{"prompt": [user("hi")], "chosen": whole("a"), "rejected": whole("b")}], rows=[pair()], told=[]),
        jsonl("pair_with_scores", [{"prompt": "hi", "chosen": whole("a"), "rejected": whole("b"), "score_chosen": 8.5, "score_rejected": 5.0}], rows=[pair()], told=["score_chosen"]),
        jsonl("pair_with_messages", [{"prompt": "hi", "chosen": whole("a"), "rejected": whole("b"), "messages": whole("a")}], rows=[pair()]),
        jsonl("pair_implicit_equal", [{"chosen": whole("a"), "rejected": whole("b")}, {"chosen": whole("a"), "rejected": whole("a")}], refused=["row 2|jsonl:2", "equal|same|rejected"]),
        refused("pair_implicit_nothing_shared", [{"chosen": whole("a"), "rejected": whole("b")}, {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("b")]}], ["row 2|jsonl:2", "prompt"]),
        refused("pair_mixed", [{"prompt": "hi", "chosen": "a", "rejected": [assistant("b")]}], ["row 1|jsonl:1", "chosen", "rejected"]),
        refused("pair_number", [{"prompt": "hi", "chosen": "a", "rejected": "b"}, {"prompt": "hi", "chosen": 5, "rejected": "b"}], ["row 2|jsonl:2", "chosen"]),
        refused("pair_null", [{"prompt": "hi", "chosen": "a", "rejected": "b"}, {"prompt": "hi", "chosen": "a", "rejected": None}], ["row 2|jsonl:2", "rejected"]),
        refused("pair_lists_of_texts", [{"prompt": "hi", "chosen": ["a"], "rejected": ["b"]}], ["row 1|jsonl:1", "chosen"]),
        jsonl("completion_texts", [{"prompt": "hi", "completion": "oak"}], rows=[{"prompt": "hi", "chosen": "oak"}]),
        jsonl("completion_messages", [{"prompt": [user("hi")], "completion": [assistant("oak")]}]),
        jsonl("completion_one_object", [{"prompt": [user("hi")], "completion": assistant("oak")}], rows=[{"prompt": [user("hi")], "completion": [assistant("oak")]}]),
        jsonl("completion_named", [{"prompt": "hi", "completion": "oak"}], rows=[{"prompt": "hi", "chosen": "oak"}], pairs={"format": "prompt_completion"}),
        jsonl("completion_system", [{"prompt": [system("Be brief."), user("hi")], "completion": [assistant("oak")]}]),
        refused("completion_null", [{"prompt": "hi", "completion": "oak"}, {"prompt": "hi", "completion": None}], ["row 2|jsonl:2", "completion|chosen"]),
        jsonl("preference_named", [{"prompt": "hi", "chosen": "a", "rejected": "b"}], pairs={"format": "preference"}),
        jsonl("messages_named", [{"messages": HI}], pairs={"format": "messages"}),
        jsonl("form_that_does_not_fit", [{"messages": HI}], refused=["conversations", "messages"], pairs={"format": "sharegpt"}),
        refused("form_that_does_not_fit_at_all", [{"prompt": "hi", "completion": "oak"}], ["conversations", "prompt"], pairs={"format": "sharegpt"}),
        refused("form_that_lacks_a_column", [{"instruction": "add"}], ["output"], pairs={"format": "alpaca"}),
        refused("form_unknown", [{"messages": HI}], ["sharegpt", "alpaca"], pairs={"format": "chatml"}),
        # KTO: an answer with a label, good or bad.
        jsonl("kto", [{"prompt": [user("hi")], "completion": [assistant("oak")], "label": True}, {"prompt": [user("hi")], "completion": [assistant("no")], "label": False}], rows=[{"prompt": [user("hi")], "completion": [assistant("oak")]}, {"prompt": [user("hi")], "completion": [assistant("no")]}]),
        jsonl("kto_texts", [{"prompt": "hi", "completion": "oak", "label": True}, {"prompt": "hi", "completion": "no", "label": False}], rows=[{"prompt": "hi", "chosen": "oak"}, {"prompt": "hi", "chosen": "no"}]),
        jsonl("kto_named", [{"prompt": "hi", "completion": "oak", "label": True}], rows=[{"prompt": "hi", "chosen": "oak"}], refused=["label"], pairs={"format": "kto"}),
    ]


def transcripts():
    def hh(chosen, rejected):
        return {"chosen": chosen, "rejected": rejected}

    start = "\n\nHuman: name a tree\n\nAssistant: oak\n\nHuman: another\n\nAssistant:"
    before = [user("name a tree"), assistant("oak"), user("another")]
    meant = lambda a, b, prompt=None: {"prompt": prompt or before, "chosen": [assistant(a)], "rejected": [assistant(b)]}
    row = hh(start + " elm", start + " a stone")
    first = hh("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nAssistant: b")
    hi = [user("hi")]
    return [
        jsonl("hh", [row], rows=[meant("elm", "a stone")]),
        jsonl("hh_named", [row], rows=[meant("elm", "a stone")], pairs={"format": "transcripts"}),
        jsonl("hh_told", [row], rows=[meant("elm", "a stone")], told=["transcript|Human:"]),
        jsonl("hh_one_turn", [first, row], rows=[meant("a", "b", hi), meant("elm", "a stone")]),
        jsonl("hh_answers_begin_alike", [hh(start + " a beech", start + " a birch")], rows=[meant("a beech", "a birch")]),
        jsonl("hh_one_is_part_of_the_other", [hh(start + " elm", start + " elm tree")], rows=[meant("elm", "elm tree")]),
        jsonl("hh_lines_in_answers", [hh(start + " elm\n\nand ash", start + " no\n1\n2")], rows=[meant("elm\n\nand ash", "no\n1\n2")]),
        jsonl("hh_human_in_a_text", [hh("\n\nHuman: what is Human: for?\n\nAssistant: a", "\n\nHuman: what is Human: for?\n\nAssistant: b")], rows=[meant("a", "b", [user("what is Human: for?")])]),
        jsonl("hh_empty_answer", [hh(start + " elm", start)], rows=[meant("elm", "")], refused=["row 1|jsonl:1", "rejected"]),
        refused("hh_human_last", [first, hh(start + " elm\n\nHuman: and?", start + " stone\n\nHuman: why?")], ["row 2|jsonl:2", "Human|assistant|answer"]),
        refused("hh_nothing_shared", [first, hh("\n\nHuman: x\n\nAssistant: a", "\n\nHuman: y\n\nAssistant: b")], ["row 2|jsonl:2", "prompt"]),
        jsonl("hh_equal", [first, hh(start + " elm", start + " elm")], rows=[meant("a", "b", hi), meant("elm", "elm")], refused=["row 2|jsonl:2", "equal|same|rejected"]),
        refused("hh_not_a_transcript", [first, hh("elm", "stone")], ["row 2|jsonl:2", "prompt|transcript|Human"]),
        jsonl("hh_turns_that_differ_earlier", [hh("\n\nHuman: hi\n\nAssistant: a\n\nHuman: so\n\nAssistant: c", "\n\nHuman: hi\n\nAssistant: b\n\nHuman: so\n\nAssistant: d")],
              rows=[{"prompt": hi, "chosen": [assistant("a"), user("so"), assistant("c")], "rejected": [assistant("b"), user("so"), assistant("d")]}], refused=["row 1|jsonl:1"]),
        jsonl("hh_without_blank_lines", [hh("Human: hi\n\nAssistant: a", "Human: hi\n\nAssistant: b")], rows=[meant("a", "b", hi)], refused=["row 1|jsonl:1|prompt"]),
        jsonl("texts_without_prompt", [hh("Trees: oak", "Trees: stone")], rows=None, refused=["prompt"]),
    ]


def plain():
    """`text` alone, and columns that nobody can guess."""
    return [
        jsonl("text", [{"text": "An oak is a tree."}, {"text": " Two  spaces\n"}], rows=[{"text": "An oak is a tree."}, {"text": " Two  spaces\n"}], compare="sft"),
        jsonl("text_named", [{"text": "An oak is a tree."}], rows=[{"text": "An oak is a tree."}], compare="sft", pairs={"format": "text"}),
        jsonl("text_ends_with_eos", [{"text": "An oak<|end_of_text|>"}, {"text": "<|begin_of_text|>An oak"}], rows=[{"text": "An oak<|end_of_text|>"}, {"text": "<|begin_of_text|>An oak"}], compare="sft"),
        refused("text_null", [{"text": "x"}, {"text": None}], ["row 2|jsonl:2", "text"]),
        refused("text_list", [{"text": ["x"]}], ["row 1|jsonl:1", "text"]),
        Case("text_file", {"rows.txt": "An oak.\nAn elm.\n"}, refused=["rows.txt", "jsonl|format"], pairs={"path": "rows.txt"}, loader=("text", {})),
        jsonl("question_answer", [{"question": "hi", "answer": "oak"}], rows=None, refused=["question", "answer", "columns"]),
        jsonl("input_output", [{"input": "hi", "output": "oak"}], rows=None, refused=["input", "output", "columns"]),
        jsonl("chosen_response", [{"question": "hi", "chosen_response": "a", "rejected_response": "b"}], rows=None, refused=["chosen_response", "columns"]),
        jsonl("query_response", [{"query": "hi", "response": "oak"}], rows=None, refused=["query", "response", "columns"]),
        jsonl("dialogue_only", [{"dialogue": [user("hi"), assistant("oak")]}], rows=None, refused=["dialogue", "columns"]),
        jsonl("capital_columns", [{"Prompt": "hi", "Chosen": "a", "Rejected": "b"}], rows=[pair()], refused=["Prompt", "columns"]),
        jsonl("columns_with_spaces", [{"prompt ": "hi", "chosen": "a", "rejected": "b"}], rows=[pair()], refused=["prompt"]),
        jsonl("ids_only", [{"input_ids": [1, 2], "labels": [1, 2]}], rows=None, refused=["input_ids", "columns"]),
        jsonl("one_form_in_one_row_another_in_the_next", [{"messages": HI}, {"prompt": "hi", "completion": "oak"}], rows=[{"messages": HI}, {"prompt": "hi", "chosen": "oak"}], refused=["row 2|jsonl:2|messages|completion"]),
        jsonl("two_forms_at_once", [{"messages": HI, "instruction": "hi", "output": "oak"}], rows=[{"messages": HI}], told=["instruction"], refused=["instruction"]),
    ]


def cases():
    return [(sharegpt(), "ShareGPT"), (alpaca(), "Alpaca"), (preferences(), "preferences and completions"), (transcripts(), "transcripts"), (plain(), "text and unknown columns")]
