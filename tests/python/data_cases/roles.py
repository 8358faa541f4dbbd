"""Who speaks, in which order, and who doesn't."""

from .case import EXACT, TOOLS, Case, assistant, chat, jsonl, refused, system, user

# A template that insists on turns, as Mistral's and Gemma's do.
TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
HI = [user("hi"), assistant("oak")]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def names():
    """Rows whose second one has roles under other names: read as meant, or refused with the row."""
    cases = []
    for user_name, assistant_name in [("Human", "Assistant"), ("human", "gpt"), ("USER", "ASSISTANT"), ("User", "Assistant"), ("human", "assistant"), ("user", "model"), ("user", "bot"), ("user", "chatgpt"), ("prompter", "assistant")]:
        rows = [{"messages": HI}, {"messages": [said(user_name, "hello"), said(assistant_name, "elm")]}]
        meant = [{"messages": HI}, {"messages": [user("hello"), assistant("elm")]}]
        odd = assistant_name if user_name == "user" else user_name
        cases.append(jsonl(f"role_{user_name}_{assistant_name}", rows, rows=meant, refused=["row 2|jsonl:2", odd]))
    for role in ["developer", "tool", "function", "ipython", "environment", "narrator"]:
        # transformers hands every role to the template; what is refused must name the row.
        cases.append(chat(f"role_{role}", "elm", [user("hi"), assistant("oak"), said(role, "12"), user("and?")], refused=["row 1|jsonl:1", role]))
    cases += [
        chat("role_developer_first", "elm", [said("developer", "Be brief."), user("hi")], refused=["row 1|jsonl:1", "developer"]),
        chat("role_system_later", "elm", [user("hi"), assistant("oak"), system("Now in French."), user("and?")]),
        chat("role_two_systems", "elm", [system("Be brief."), system("Be kind."), user("hi")]),
        chat("role_tool_last_of_prompt", "noon", [user("time?"), assistant("", tool_calls=[{"type": "function", "function": {"name": "clock", "arguments": {}}}]), said("tool", "12:00")], template=TOOLS),
        refused("role_null", [{"messages": HI}, {"messages": [said(None, "hi"), assistant("elm")]}], ["row 2|jsonl:2", "role"]),
        refused("role_missing", [{"messages": HI}, {"messages": [{"content": "hi"}, assistant("elm")]}], ["row 2|jsonl:2", "role"]),
        refused("role_empty", [{"messages": HI}, {"messages": [said("", "hi"), assistant("elm")]}], ["row 2|jsonl:2", "role"]),
        refused("role_number", [{"messages": HI}, {"messages": [said(1, "hi"), assistant("elm")]}], ["row 2|jsonl:2", "role"]),
        refused("role_list", [{"messages": HI}, {"messages": [said(["user"], "hi"), assistant("elm")]}], ["row 2|jsonl:2", "role"]),
        jsonl("role_with_spaces", [{"messages": [said(" user", "hi"), said("assistant ", "elm")]}], rows=[{"messages": [user("hi"), assistant("elm")]}], refused=["row 1|jsonl:1", "role|user"]),
        jsonl("value_for_content", [{"messages": HI}, {"messages": [{"role": "user", "value": "hello"}, assistant("elm")]}], rows=[{"messages": HI}, {"messages": [user("hello"), assistant("elm")]}], refused=["row 2|jsonl:2", "value|content"]),
        jsonl("value_for_content_everywhere", [{"messages": [{"role": "user", "value": "hi"}, {"role": "assistant", "value": "oak"}]}], rows=[{"messages": HI}], refused=["row 1|jsonl:1", "value|content"]),
        jsonl("text_for_content", [{"messages": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "oak"}]}], rows=[{"messages": HI}], refused=["row 1|jsonl:1", "text|content"]),
        jsonl("from_and_content", [{"messages": [{"from": "user", "content": "hi"}, {"from": "assistant", "content": "oak"}]}], rows=[{"messages": HI}], refused=["row 1|jsonl:1", "role|from"]),
        jsonl("from_value_in_messages", [{"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "oak"}]}], rows=[{"messages": HI}], refused=["row 1|jsonl:1", "from|role"]),
        jsonl("role_content_in_conversations", [{"conversations": HI}], rows=[{"messages": HI}]),
        jsonl("both_role_and_from", [{"messages": [{"role": "user", "from": "human", "content": "hi"}, {"role": "assistant", "from": "gpt", "content": "oak"}]}], rows=[{"messages": HI}], refused=["row 1|jsonl:1", "from"]),
        jsonl("content_and_value", [{"messages": [{"role": "user", "content": "hi", "value": "other"}, assistant("oak")]}], rows=[{"messages": HI}], told=["value"], refused=["row 1|jsonl:1", "value"]),
    ]
    return cases


def turns():
    """Orders of turns."""
    call = assistant("", tool_calls=[{"type": "function", "function": {"name": "clock", "arguments": {}}}])
    pair = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    two = {"messages": [user("one"), assistant("1"), user("two"), assistant("2")]}
    return [
        jsonl("turns_two", [{"messages": HI}, two], told=["1", "answer|turn"]),
        jsonl("turns_two_with_system", [{"messages": [system("Count."), *two["messages"]]}], told=["1", "answer|turn"]),
        jsonl("turns_many", [{"messages": [message for n in range(20) for message in (user(f"say {n}"), assistant(f"{n}"))]}]),
        jsonl("turns_no_answer_at_the_end", [{"messages": HI}, {"messages": [*HI, user("and?")]}], rows=[{"messages": HI}, {"messages": HI}], told=["1|row 2"], refused=["row 2|jsonl:2", "assistant|answer"]),
        jsonl("turns_system_at_the_end", [{"messages": HI}, {"messages": [*HI, system("x")]}], rows=[{"messages": HI}, {"messages": HI}], told=["1|row 2"], refused=["row 2|jsonl:2", "assistant|answer"]),
        jsonl("turns_two_users", [{"messages": [user("hi"), user("there"), assistant("oak")]}]),
        jsonl("turns_two_answers", [{"messages": [user("hi"), assistant("oak"), assistant("elm")]}], compare="text"),
        refused("turns_no_assistant", [{"messages": HI}, {"messages": [user("hi"), user("there")]}], ["row 2|jsonl:2", "assistant|answer"]),
        refused("turns_only_system", [{"messages": HI}, {"messages": [system("hi")]}], ["row 2|jsonl:2", "assistant|answer"]),
        jsonl("turns_only_assistant", [{"messages": HI}, {"messages": [assistant("oak")]}], rows=None, refused=["row 2|jsonl:2", "prompt|question|user"]),
        refused("turns_none", [{"messages": HI}, {"messages": []}], ["row 2|jsonl:2", "messages|empty|assistant"]),
        refused("turns_null", [{"messages": HI}, {"messages": None}], ["row 2|jsonl:2", "messages"]),
        refused("turns_that_are_text", [{"messages": HI}, {"messages": "hi"}], ["row 2|jsonl:2", "messages"]),
        refused("turns_all_text", [{"messages": "hi"}], ["row 1|jsonl:1", "messages"]),
        refused("turns_that_are_texts", [{"messages": ["hi", "oak"]}], ["row 1|jsonl:1", "messages"]),
        refused("turns_with_a_null", [{"messages": HI}, {"messages": [user("hi"), None, assistant("oak")]}], ["row 2|jsonl:2", "messages|message"]),
        refused("turns_of_lists", [{"messages": [["user", "hi"], ["assistant", "oak"]]}], ["row 1|jsonl:1", "messages|message"]),
        jsonl("turns_one_object", [{"messages": user("hi")}], rows=None, refused=["row 1|jsonl:1", "messages"]),
        jsonl("turns_system_and_user", [{"messages": [system("Be brief."), *HI]}, {"messages": HI}]),
        jsonl("turns_system_column", [{"system": "Be brief.", "messages": HI}, {"system": None, "messages": HI}, {"system": "", "messages": HI}]),
        jsonl("turns_system_column_and_message", [{"system": "Be kind.", "messages": [system("Be brief."), *HI]}], rows=[{"messages": [system("Be brief."), *HI]}], told=["system"], refused=["row 1|jsonl:1", "system"]),
        jsonl("turns_call_at_the_end", [{"messages": [user("time?"), call]}], template=TOOLS),
        jsonl("turns_tool_at_the_end", [{"messages": [user("time?"), call, said("tool", "12")]}, {"messages": HI}], rows=[{"messages": [user("time?"), call]}, {"messages": HI}], told=["1"], refused=["row 1|jsonl:1", "assistant|answer"], template=TOOLS),
        refused("turns_the_template_refuses", [{"messages": HI}, {"messages": [user("hi"), user("there"), assistant("oak")]}], ["row 2|jsonl:2", "roles must alternate"], template=TURNS),
        refused("turns_the_template_refuses_system", [{"messages": [system("x"), *HI]}], ["row 1|jsonl:1", "roles must alternate"], template=TURNS),
        jsonl("turns_of_a_pair", [{"prompt": [user("one"), assistant("1"), user("two")], "chosen": [assistant("2")], "rejected": [assistant("3")]}]),
        jsonl("turns_in_answers", [{"prompt": [user("one")], "chosen": [assistant("1"), user("sure?"), assistant("yes")], "rejected": [assistant("2"), user("sure?"), assistant("no")]}]),
        refused("turns_pair_without_chosen", [pair, {**pair, "chosen": []}], ["row 2|jsonl:2", "chosen"]),
        refused("turns_pair_without_rejected", [pair, {**pair, "rejected": []}], ["row 2|jsonl:2", "rejected"]),
        refused("turns_pair_with_null_rejected", [pair, {**pair, "rejected": None}], ["row 2|jsonl:2", "rejected"]),
        refused("turns_pair_with_null_chosen", [pair, {**pair, "chosen": None}], ["row 2|jsonl:2", "chosen"]),
        refused("turns_pair_with_null_prompt", [pair, {**pair, "prompt": None}], ["row 2|jsonl:2", "prompt"]),
        refused("turns_pair_with_empty_prompt", [pair, {**pair, "prompt": []}], ["row 2|jsonl:2", "prompt"]),
        jsonl("turns_pair_user_as_answer", [{"prompt": [user("hi")], "chosen": [user("a")], "rejected": [user("b")]}], refused=["row 1|jsonl:1", "assistant|user"]),
        jsonl("turns_equal_answers", [{"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("a")]}]),
        jsonl("turns_empty_answers", [{"prompt": [user("hi")], "chosen": [assistant("")], "rejected": [assistant("a")]}]),
    ]


def continued():
    """Prompts that end with the beginning of an answer: TRL continues the last message."""
    def pair(beginning, chosen=" tree", rejected=" bush", **more):
        return {"prompt": [user("name one"), assistant(beginning, **more)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}

    return [
        jsonl("continue_plain", [pair("An oak")]),
        jsonl("continue_space", [pair("An oak ")]),
        jsonl("continue_space_kept", [pair("An oak ")], template=EXACT),
        jsonl("continue_newline_kept", [pair("An oak:\n")], template=EXACT),
        jsonl("continue_leading_space_kept", [pair("  An oak")], template=EXACT),
        jsonl("continue_plain_kept", [pair("An oak")], template=EXACT),
        jsonl("continue_spaces_both", [pair("  An oak  ")]),
        jsonl("continue_text_said_before", [{"prompt": [user("An oak"), assistant("An oak")], "chosen": [assistant(" tree")], "rejected": [assistant(" bush")]}], template=EXACT),
        jsonl("continue_text_of_the_template", [pair("assistant")], template=EXACT),
        jsonl("continue_a_letter", [pair("a")], template=EXACT),
        jsonl("continue_parts", [pair([{"type": "text", "text": "An oak"}])], rows=[pair("An oak")]),
        jsonl("continue_completion", [{"prompt": [user("name one"), assistant("An oak ")], "completion": [assistant("tree")]}], template=EXACT),
        jsonl("continue_empty", [pair("")], template=EXACT, refused=["row 1|jsonl:1", "empty|content"]),
        jsonl("continue_only_spaces", [pair("  ")], template=EXACT, refused=["row 1|jsonl:1", "empty|content|space"]),
    ]


def cases():
    return [(names(), "roles"), (turns(), "turns"), (continued(), "continued answers")]
