"""What stands in a message: text, parts, nothing, other things; and the keys beside it."""

from .case import EXACT, PARTS, TOOLS, WHOLE, THINK, THINKING, KWARGS, assistant, chat, jsonl, refused, system, user

TEXT = {"type": "text", "text": "name a tree"}
IMAGE = {"type": "image", "image": "tree.png"}
IMAGE_URL = {"type": "image_url", "image_url": {"url": "https://example.org/tree.png"}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


def exchange(question, answer="oak"):
    return {"messages": [user(question), assistant(answer)]}


def meant(*pairs):
    return [exchange(*pair) if isinstance(pair, tuple) else exchange(pair) for pair in pairs]


def content():
    two = [{"type": "text", "text": "name a tree"}, {"type": "text", "text": "and a bush"}]
    cases = [
        jsonl("text_then_parts", [exchange("hi"), exchange([TEXT])], rows=meant("hi", "name a tree")),
        jsonl("parts_then_text", [exchange([TEXT]), exchange("hi")], rows=meant("name a tree", "hi")),
        jsonl("parts_everywhere", [exchange([TEXT], [{"type": "text", "text": "oak"}])], rows=meant("name a tree")),
        jsonl("parts_in_system", [{"messages": [system([TEXT]), user("hi"), assistant("oak")]}], rows=[{"messages": [system("name a tree"), user("hi"), assistant("oak")]}]),
        jsonl("parts_in_answer", [exchange("hi"), exchange("hi", [{"type": "text", "text": "elm"}])], rows=meant("hi", ("hi", "elm"))),
        # transformers joins the texts of parts by a space where a model takes texts only (its server does).
        jsonl("two_parts", [exchange("hi"), exchange(two)], rows=meant("hi", "name a tree and a bush")),
        jsonl("two_parts_walked", [exchange("hi"), exchange(two)], template=PARTS),
        jsonl("one_part_walked", [exchange([TEXT]), exchange("hi")], template=PARTS),
        jsonl("part_with_more_keys", [exchange([{**TEXT, "cache_control": {"type": "ephemeral"}}])], rows=meant("name a tree"), refused=["row 1|jsonl:1", "cache_control"]),
        jsonl("part_input_text", [exchange([{"type": "input_text", "text": "name a tree"}])], rows=meant("name a tree"), refused=["row 1|jsonl:1", "input_text"]),
        jsonl("part_output_text", [exchange("hi", [{"type": "output_text", "text": "oak"}])], rows=meant("hi"), refused=["row 1|jsonl:1", "output_text"]),
        jsonl("part_without_type", [exchange([{"text": "name a tree"}])], rows=meant("name a tree"), refused=["row 1|jsonl:1", "type"]),
        refused("part_that_is_text", [exchange("hi"), exchange(["a", "b"])], ["row 2|jsonl:2", "content|part"]),
        refused("part_image", [exchange("hi"), exchange([IMAGE, TEXT])], ["row 2|jsonl:2", "image"]),
        refused("part_image_walked", [exchange("hi"), exchange([IMAGE, TEXT])], ["row 2|jsonl:2", "image"], template=PARTS),
        refused("part_image_url", [exchange([TEXT, IMAGE_URL])], ["row 1|jsonl:1", "image_url"]),
        refused("part_audio", [exchange([{"type": "input_audio", "input_audio": {"data": "AAAA"}}])], ["row 1|jsonl:1", "audio"]),
        refused("part_video", [exchange([{"type": "video", "video": "x.mp4"}])], ["row 1|jsonl:1", "video"]),
        refused("part_image_in_answer", [exchange("hi"), exchange("hi"), exchange("hi", [IMAGE])], ["row 3|jsonl:3", "image"]),
        refused("part_without_text", [exchange([{"type": "text"}])], ["row 1|jsonl:1", "text"]),
        refused("part_with_null_text", [exchange([{"type": "text", "text": None}])], ["row 1|jsonl:1", "text"]),
        jsonl("no_parts", [exchange([])], rows=meant(""), refused=["row 1|jsonl:1", "content"]),
        chat("null_content_with_call", assistant(None, tool_calls=[CALL]), template=TOOLS),
        chat("no_content_with_call", {"role": "assistant", "tool_calls": [CALL]}, template=TOOLS),
        chat("empty_content_with_call", assistant("", tool_calls=[CALL]), template=TOOLS),
        jsonl("null_content_in_one_row", [{"messages": [user("hi"), assistant(None, tool_calls=[CALL])]}, exchange("hi")], template=TOOLS),
        jsonl("null_content", [exchange("hi"), exchange("hi", None)], rows=meant("hi", ("hi", "")), told=["content|empty"], refused=["row 2|jsonl:2", "content"]),
        jsonl("null_content_of_user", [exchange(None)], rows=meant(""), told=["content|empty"], refused=["row 1|jsonl:1", "content"]),
        jsonl("missing_content", [exchange("hi"), {"messages": [user("hi"), {"role": "assistant"}]}], rows=meant("hi", ("hi", "")), told=["content|empty"], refused=["row 2|jsonl:2", "content"]),
        jsonl("number_as_content", [exchange("hi"), exchange(5)], rows=meant("hi", "5"), refused=["row 2|jsonl:2", "content"]),
        jsonl("numbers_as_contents", [exchange(5), exchange(6)], rows=meant("5", "6"), refused=["row 1|jsonl:1", "content"]),
        jsonl("true_as_content", [exchange("hi"), exchange(True)], refused=["row 2|jsonl:2", "content"]),
        refused("object_as_content", [exchange({"a": 1})], ["row 1|jsonl:1", "content"]),
        chat("empty_question", "oak", ""),
        chat("empty_answer", ""),
        chat("spaces_as_question", "oak", "  \n "),
        chat("spaces_around", "  oak  \n", "\t hi ", template=EXACT),
        chat("spaces_around_trimmed", "  oak \u00a0\u3000\u001c\n", "\t hi \u0085"),
        chat("text_like_parts", '[{"type": "text", "text": "x"}]', '[{"type": "text", "text": "y"}]', template=EXACT),
        chat("text_in_quotes", '"pear"', '"name a fruit"', template=EXACT),
        chat("text_like_numbers", "1.0", "1e5", template=EXACT),
        chat("text_like_dates", "2024-01-01T00:00:00Z", "2024-01-01 10:00:00", template=EXACT),
        chat("text_like_null", "null", "true", template=EXACT),
        chat("text_like_json", '{"a": 1}', "{}", template=EXACT),
        jsonl("escapes", '{"messages": [{"role": "user", "content": "caf\\u00e9 \\ud83d\\ude00 \\/ \\u2028 \\t"}, {"role": "assistant", "content": "\\u4e2d"}]}\n', template=EXACT),
        jsonl("nul_in_text", '{"messages": [{"role": "user", "content": "a\\u0000b"}, {"role": "assistant", "content": "c"}]}\n', template=EXACT, refused=["jsonl:1|row 1"]),
        refused("half_a_surrogate", '{"messages": [{"role": "user", "content": "a\\ud800b"}, {"role": "assistant", "content": "c"}]}\n', ["jsonl:1|row 1"]),
        chat("braces_are_no_template", "{{ 7 * 7 }}", "{% raw %}", template=EXACT),
        chat("carriage_returns", "a\r\nb", "c\rd", template=EXACT),
        chat("line_separators", "a\u2028b\u2029c\u0085d\x0be", template=EXACT),
        chat("astral_and_combining", "e\u0301 \U0001f468\u200d\U0001f469", "\ufeffhi\ufeff", template=EXACT),
        jsonl("preference_with_parts", [
            {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            {"prompt": [user([TEXT])], "chosen": [assistant([{"type": "text", "text": "oak"}])], "rejected": [assistant("b")]},
        ], rows=[
            {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            {"prompt": [user("name a tree")], "chosen": [assistant("oak")], "rejected": [assistant("b")]},
        ]),
        refused("preference_with_an_image", [
            {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            {"prompt": [user([IMAGE])], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ], ["row 2|jsonl:2", "image"]),
    ]
    return cases


TOOL = {"type": "function", "function": {"name": "clock", "description": "Tells <the> time.", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number", "default": 1.0}, "b": {"enum": [1, "two", None]}}, "required": ["a"]}}}


def around():
    """Columns beside the messages, and keys beside the content."""
    import json

    hi = [user("hi"), assistant("oak")]
    pair = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    return [
        jsonl("tools", [{"messages": hi, "tools": [TOOL]}], template=TOOLS),
        jsonl("tools_in_some_rows", [{"messages": hi, "tools": [TOOL]}, {"messages": hi, "tools": None}, {"messages": hi}], template=TOOLS),
        jsonl("tools_that_differ", [{"messages": hi, "tools": [TOOL]}, {"messages": hi, "tools": [OTHER]}, {"messages": hi, "tools": [TOOL, OTHER]}], template=TOOLS),
        jsonl("tools_empty", [{"messages": hi, "tools": []}], template=TOOLS),
        jsonl("tools_as_text", [{"messages": hi, "tools": json.dumps([TOOL])}], template=TOOLS),
        jsonl("tools_as_text_in_some_rows", [{"messages": hi, "tools": json.dumps([TOOL])}, {"messages": hi, "tools": None}], template=TOOLS),
        refused("tools_as_broken_text", [{"messages": hi, "tools": "[{"}], ["row 1|jsonl:1", "tools"], template=TOOLS),
        refused("tools_that_are_a_number", [{"messages": hi, "tools": 5}], ["row 1|jsonl:1", "tools"], template=TOOLS),
        jsonl("tools_with_a_preference", [{**pair, "tools": [TOOL]}], template=TOOLS),
        jsonl("tools_not_called_for", [{"messages": hi, "tools": [TOOL]}], told=["tools"], template=EXACT),
        jsonl("tool_that_is_a_name", [{"messages": hi, "tools": ["clock"]}], rows=None, refused=["row 1|jsonl:1", "tools"], template=TOOLS),
        jsonl("kwargs", [{"messages": hi, "chat_template_kwargs": {"enable_thinking": False}}], template=KWARGS),
        jsonl("kwargs_of_each_row", [{"messages": hi, "chat_template_kwargs": {"enable_thinking": False}}, {"messages": hi, "chat_template_kwargs": {"enable_thinking": True}}], template=KWARGS),
        jsonl("kwargs_of_other_types", [{"messages": hi, "chat_template_kwargs": {"level": 1.0}}, {"messages": hi, "chat_template_kwargs": {"level": "high"}}, {"messages": hi, "chat_template_kwargs": {"level": [1, {}]}}], template=KWARGS),
        jsonl("kwargs_in_some_rows", [{"messages": hi, "chat_template_kwargs": {"level": 1}}, {"messages": hi}, {"messages": hi, "chat_template_kwargs": {}}], template=KWARGS),
        jsonl("kwargs_with_a_preference", [{**pair, "chat_template_kwargs": {"enable_thinking": False}}], template=KWARGS),
        refused("kwargs_that_are_text", [{"messages": hi, "chat_template_kwargs": "x"}], ["row 1|jsonl:1", "chat_template_kwargs"], template=KWARGS),
        # transformers knows documents; TRL hands them on only in `chat_template_kwargs`.
        jsonl("documents", [{"messages": hi, "documents": [{"title": "Trees", "text": "Oaks are trees."}]}, {"messages": hi, "documents": None}], template=KWARGS, readings=[([{"messages": hi}] * 2, ["documents"])]),
        jsonl("kwargs_documents", [{"messages": hi, "chat_template_kwargs": {"documents": [{"title": "Trees", "text": "Oaks are trees."}]}}], template=KWARGS),
        jsonl("column_nobody_uses", [{"messages": hi, "source": "web"}], told=["source"], template=EXACT),
        chat("reasoning_content", assistant("4", reasoning_content="add the two"), template=THINK),
        chat("thinking", assistant("4", thinking="add the two"), template=THINK),
        chat("reasoning", assistant("4", reasoning="add the two"), template=THINK),
        chat("reasoning_content_as_thinking", assistant("4", reasoning_content="add the two"), template=THINKING),
        chat("reasoning_as_thinking", assistant("4", reasoning="add the two"), template=THINKING),
        chat("reasoning_and_thinking", assistant("4", reasoning="one", thinking="two"), template=THINK),
        chat("reasoning_null_and_thinking", assistant("4", reasoning_content=None, thinking="two"), template=THINK),
        chat("reasoning_empty_and_thinking", assistant("4", reasoning_content="", thinking="two"), template=THINK),
        jsonl("reasoning_in_some_rows", [{"messages": [user("hi"), assistant("4", thinking="two")]}, {"messages": hi}], template=THINK),
        chat("reasoning_of_an_earlier_turn", assistant("5"), [user("hi"), assistant("4", thinking="two"), user("and")], template=THINK),
        chat("reasoning_whole", assistant("4", reasoning="add the two"), template=WHOLE),
        chat("reasoning_with_parts", assistant([{"type": "text", "text": "4"}], thinking="two"), template=PARTS.replace("{% if m.content", "{{ m.thinking }}{% if m.content")),
        chat("thought_not_called_for", assistant("4", thinking="two"), template=EXACT, told=["thinking"], refused=["row 1|jsonl:1", "thinking"]),
        jsonl("name", [{"messages": [{"role": "user", "content": "hi", "name": "ann"}, assistant("oak")]}, {"messages": hi}], template=TOOLS),
        chat("tool_call_id", assistant("noon"), [user("time?"), assistant("", tool_calls=[{**CALL, "id": "c1"}]), {"role": "tool", "tool_call_id": "c1", "name": "clock", "content": "12:00"}], template=TOOLS),
        chat("calls_with_ids", assistant("noon"), [user("time?"), assistant(None, tool_calls=[{**CALL, "id": "c1"}, {**CALL, "id": "c2"}]), {"role": "tool", "tool_call_id": "c1", "content": "12:00"}, {"role": "tool", "tool_call_id": "c2", "content": "13:00"}], template=WHOLE),
        jsonl("null_calls", [{"messages": [user("hi"), assistant("oak", tool_calls=None)]}, {"messages": [user("hi"), assistant(None, tool_calls=[CALL])]}], template=WHOLE),
        jsonl("keys_of_other_rows", [{"messages": [user("hi"), assistant("oak", weight=1)]}, {"messages": [user("hi"), assistant("elm", lang="en")]}], template=WHOLE),
        jsonl("key_order_of_messages", [{"messages": [user("hi"), {"content": "oak", "role": "assistant"}]}, {"messages": [{"content": "hi", "role": "user"}, assistant("elm")]}], template=WHOLE),
    ]


def cases():
    return [(content(), "content"), (around(), "columns and keys")]
