"""Columns, splits, rows left out, rows that are rendered already, token ids and tokenizers."""

import json

from .arguments import objects
from .case import CHATML, EXACT, NO_PROMPT, TOOLS, Case, assistant, jsonl, lines, refused, system, user
from .reference import MODEL

PAIR = {"prompt": "hi", "chosen": "a", "rejected": "b"}
HI = [user("hi"), assistant("oak")]


def columns():
    rows = [{"q": "name a tree", "good": "oak", "bad": "a", "hint": "tall", "meta": {"question": "deep?", "answers": [{"text": "yes"}, {"text": "no"}], "n": 5}, "n": 7}]
    def to(mapping, prompt="name a tree", chosen="oak", rejected="a", name=None, **more):
        return jsonl(f"columns_{name}", rows, rows=[{"prompt": prompt, "chosen": chosen, "rejected": rejected}], pairs={"columns": mapping}, template=EXACT, **more)
    rest = {"chosen": "good", "rejected": "bad"}
    def no(name, mapping, words):
        return refused(f"columns_{name}", rows, words, pairs={"columns": mapping})
    return [
        to({"prompt": "q", **rest}, name="renamed"),
        to({"prompt": "${q}\n\n${hint}", **rest}, "name a tree\n\ntall", name="joined"),
        to({"prompt": "{{ q }}\n\n{{ hint }}", **rest}, "name a tree\n\ntall", name="joined_by_jinja"),
        to({"prompt": "Q: {{ q | upper }}", **rest}, "Q: NAME A TREE", name="filtered"),
        to({"prompt": "{% if hint %}{{ q }} ({{ hint }}){% else %}{{ q }}{% endif %}", **rest}, "name a tree (tall)", name="conditional"),
        to({"prompt": "meta.question", **rest}, "deep?", name="of_struct"),
        to({"prompt": "q", "chosen": "meta.answers[0].text", "rejected": "meta.answers[1].text"}, chosen="yes", rejected="no", name="of_list"),
        to({"prompt": "{{ meta.question }} {{ meta.answers[1].text }}", **rest}, "deep? no", name="of_struct_by_jinja"),
        to({"prompt": "${meta.question}", **rest}, "deep?", name="of_struct_braced"),
        to({"prompt": "{{ q }}\n", **rest}, "name a tree\n", name="newline_at_the_end"),
        jsonl("columns_system", rows, rows=[{"prompt": [system("tall"), user("name a tree")], "chosen": [assistant("oak")], "rejected": [assistant("a")]}], pairs={"columns": {"prompt": "q", **rest, "system": "hint"}}, template=EXACT),
        to({"prompt": "Number ${n}", **rest}, "Number 7", name="number_joined"),
        no("unknown", {"prompt": "question", **rest}, ["question", "hint"]),
        no("unknown_in_expression", {"prompt": "${question}", **rest}, ["question"]),
        no("unknown_field", {"prompt": "meta.title", **rest}, ["title"]),
        no("beyond_the_list", {"prompt": "q", "chosen": "meta.answers[5].text", "rejected": "bad"}, ["row 1|jsonl:1", "answers"]),
        no("of_ours_unknown", {"promt": "q", **rest}, ["promt", "prompt"]),
        no("broken_expression", {"prompt": "{{ q", **rest}, ["columns"]),
        no("number", {"prompt": "n", **rest}, ["row 1|jsonl:1|prompt"]),
        jsonl("columns_null_joined", [{"q": "hi", "hint": None, "a": "oak"}], rows=[{"prompt": "hi\n\n", "chosen": "oak"}], refused=["row 1|jsonl:1", "hint"], pairs={"columns": {"prompt": "${q}\n\n${hint}", "chosen": "a"}}),
        jsonl("columns_absent_joined", [{"q": "hi", "hint": "tall", "a": "oak"}, {"q": "hi", "a": "elm"}], rows=[{"prompt": "hi\n\ntall", "chosen": "oak"}, {"prompt": "hi\n\n", "chosen": "elm"}], refused=["row 2|jsonl:2", "hint"], pairs={"columns": {"prompt": "${q}\n\n${hint}", "chosen": "a"}}),
        jsonl("columns_with_dots_in_names", [{"meta.question": "hi", "chosen": "a", "rejected": "b"}], rows=[PAIR], pairs={"columns": {"prompt": "meta.question"}}),
        jsonl("columns_over_ours", [{"prompt": "x", "q": "hi", "chosen": "a", "rejected": "b"}], rows=[PAIR], pairs={"columns": {"prompt": "q"}}, refused=["prompt"]),
        jsonl("columns_swapped", [{"prompt": "hi", "chosen": "b", "rejected": "a"}], rows=[PAIR], pairs={"columns": {"chosen": "rejected", "rejected": "chosen"}}),
        jsonl("columns_messages_below", [{"data": {"turns": HI}}], rows=[{"messages": HI}], pairs={"columns": {"messages": "data.turns"}}),
    ]


def split():
    pairs = [{"prompt": f"question {n}", "chosen": f"good {n} {m}", "rejected": f"bad {n} {m}"} for n in range(25) for m in range(4)]
    chats = [{"messages": [user(f"question {n}"), assistant(f"answer {m}")], "topic": f"t{n % 5}"} for n in range(25) for m in range(4)]
    def made(name, rows, holds, refused=None, **more):
        stages = {"split": {"split_dataset": {"dataset": "pairs", "seed": 7, **more}}, "chats": {"apply_chat_template": {"dataset": "split", "tokenizer": "base"}}}
        return Case(name, {"rows.jsonl": lines(rows)}, stages=stages, holds=holds, refused=refused, loader=None)
    # Types below a message have to come through the split as well.
    mixed = objects('{"a": "noon"}', '{"a": 5, "b": {}}', '{"a": [1, 2.5]}')
    through = {"split": {"split_dataset": {"dataset": "pairs", "test_size": 1, "shuffle": False}}, "chats": {"apply_chat_template": {"dataset": "split", "tokenizer": "base", "chat_template": TOOLS}}}
    return [
        Case("split_carries_messages", {"rows.jsonl": lines(mixed)}, rows=mixed[:2], stages=through, template=TOOLS, holds={"counts": {"train": 2, "test": 1}}),
        made("split_pairs", pairs, {"apart": "prompt", "all": 100, "test": [8, 12]}, test_size=0.1),
        made("split_pairs_by_number", pairs, {"apart": "prompt", "all": 100, "test": [18, 22]}, test_size=20),
        made("split_pairs_in_order", pairs, {"apart": "prompt", "all": 100, "test": [8, 12]}, test_size=0.1, shuffle=False),
        made("split_chats_by_prompt", chats, {"apart": "prompt", "all": 100, "test": [8, 12]}, refused=["group_by", "prompt"], test_size=0.1, group_by="prompt"),
        made("split_by_a_column", chats, {"all": 100, "test": [20, 20]}, test_size=0.2, group_by="topic"),
        made("split_stratified", chats, {"all": 100, "test": [20, 20]}, test_size=0.2, stratify="topic"),
        Case("split_by_an_unknown_column", {"rows.jsonl": lines(pairs)}, refused=["topic"], loader=None,
             stages={"split": {"split_dataset": {"dataset": "pairs", "test_size": 0.1, "group_by": "topic"}}, "chats": {"apply_chat_template": {"dataset": "split", "tokenizer": "base"}}}),
    ]


def skipped():
    good = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    text = lines(good[:1]) + "broken\n" + lines(good[1:])
    null = lines([good[0], {**good[1], "rejected": None}, *good[1:]])
    chats = [{"messages": HI}, {"messages": [user("hi")]}, {"messages": HI}]
    two = lines(good[:1]) + "broken\nbroken\n" + lines(good[1:])
    return [
        Case("skip_none_by_default", {"rows.jsonl": text}, refused=["rows.jsonl:2"]),
        Case("skip_broken_line", {"rows.jsonl": text}, rows=good, pairs={"skip_invalid_rows": 1}, told=["1", "2"]),
        Case("skip_more_allowed", {"rows.jsonl": text}, rows=good, pairs={"skip_invalid_rows": 10}, told=["2"]),
        Case("skip_one_too_many", {"rows.jsonl": two}, refused=["rows.jsonl:3|row 3", "skip_invalid_rows|1"], pairs={"skip_invalid_rows": 1}),
        Case("skip_two", {"rows.jsonl": two}, rows=good, pairs={"skip_invalid_rows": 2}, told=["2", "3"]),
        Case("skip_null_answer", {"rows.jsonl": null}, rows=good, pairs={"skip_invalid_rows": 1}, told=["2", "rejected"]),
        Case("skip_chat_without_answer", {"rows.jsonl": lines(chats)}, rows=[{"messages": HI}, {"messages": HI}], pairs={"skip_invalid_rows": 1}, told=["2"]),
        Case("skip_image", {"rows.jsonl": lines([{"messages": HI}, {"messages": [user([{"type": "image"}]), assistant("x")]}])}, rows=[{"messages": HI}], pairs={"skip_invalid_rows": 1}, told=["2", "image"]),
        Case("skip_role", {"rows.jsonl": lines([{"messages": [{"role": None, "content": "x"}, assistant("x")]}, {"messages": HI}])}, rows=[{"messages": HI}], pairs={"skip_invalid_rows": 1}, told=["1", "role"]),
        Case("skip_csv_row", {"rows.csv": "prompt,chosen,rejected\nq0,a,b\nq,a\nq1,a,b\nq2,a,b\n"}, rows=good, pairs={"path": "rows.csv", "skip_invalid_rows": 1}, told=["2|3"], loader=None),
        Case("skip_all", {"rows.jsonl": "broken\n"}, refused=["rows.jsonl"], pairs={"skip_invalid_rows": 5}),
        Case("skip_below_zero", {"rows.jsonl": text}, refused=["skip_invalid_rows"], pairs={"skip_invalid_rows": -1}),
    ]


def rendered():
    head = lambda role: f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    prompt = "<|begin_of_text|>" + head("user") + "hi<|eot_id|>" + head("assistant")
    llama = {"prompt": prompt, "chosen": "oak<|eot_id|>", "rejected": "a<|eot_id|>"}
    im = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    chatml = {"prompt": im, "chosen": "oak<|im_end|>\n", "rejected": "a<|im_end|>\n"}
    strike = {"prompt": "What is <s>old</s> in <s>HTML</s>?", "chosen": "<s>struck</s> text", "rejected": "<s>no</s>"}
    mention = {"prompt": "What is <|eot_id|> for?", "chosen": "<|eot_id|> ends a turn.", "rejected": "b"}
    return [
        jsonl("rendered_llama3", [llama], compare="plain", told=["row 1|jsonl:1", "rendered|template"]),
        jsonl("rendered_llama3_whole", [{name: prompt + llama[name] for name in ("chosen", "rejected")}], rows=[llama], compare="plain", told=["rendered|template"]),
        jsonl("rendered_llama3_whole_with_prompt", [{"prompt": prompt, "chosen": prompt + llama["chosen"], "rejected": prompt + llama["rejected"]}], rows=[llama], compare="plain", told=["rendered|template"]),
        jsonl("rendered_llama3_whole_with_question", [{"prompt": "hi", "chosen": prompt + llama["chosen"], "rejected": prompt + llama["rejected"]}], rows=[llama], compare="plain", told=["rendered|template"], refused=["row 1|jsonl:1"]),
        jsonl("rendered_chatml", [chatml], compare="plain", told=["rendered|template"], template=CHATML),
        jsonl("rendered_chatml_whole", [{name: im + chatml[name] for name in ("chosen", "rejected")}], rows=[chatml], compare="plain", told=["rendered|template"], template=CHATML),
        jsonl("rendered_by_another_template", [chatml], told=["<|im_start|>|rendered|template"], refused=["row 1|jsonl:1", "<|im_start|>|rendered|template"]),
        jsonl("rendered_some_rows", [PAIR, llama], rows=[PAIR, {**llama, "as_it_is": True}], told=["row 2|jsonl:2", "rendered|template"], refused=["row 2|jsonl:2", "rendered|template"]),
        jsonl("strike_through", [strike]),
        jsonl("strike_through_and_s", [strike], template=NO_PROMPT),
        jsonl("strike_through_at_the_start", [{"prompt": "<s>old</s> and <s>new</s>", "chosen": "x", "rejected": "y"}], template=NO_PROMPT),
        jsonl("inst_mentioned", [{"prompt": "[INST] is a word. So is [/INST].", "chosen": "yes", "rejected": "no"}], template="{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"),
        jsonl("empty_generation_prompt", [PAIR], template="{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|eot_id|>\n{% endfor %}"),
        jsonl("empty_generation_prompt_and_markers", [{"prompt": "<|start_header_id|> and <|eot_id|>?", "chosen": "markers", "rejected": "b"}], template="{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|eot_id|>\n{% endfor %}", told=["special"]),
        jsonl("special_tokens_mentioned", [PAIR, mention], told=["special", "row 2|jsonl:2"]),
        jsonl("special_tokens_in_messages", [{"messages": [user("What is <|eot_id|>?"), assistant("An end.")]}], told=["special", "1"]),
        refused("special_tokens_refused", [PAIR, mention], ["row 2|jsonl:2", "<|eot_id|>"], chats={"special_tokens": "refuse"}),
        jsonl("special_tokens_none_to_refuse", [PAIR], chats={"special_tokens": "refuse"}),
        jsonl("special_tokens_first", [{"prompt": "<|begin_of_text|> is what?", "chosen": "a start", "rejected": "b"}], told=["special"]),
        jsonl("special_tokens_in_system", [{"system": "Never say <|eot_id|>.", **PAIR}], told=["special"]),
        jsonl("template_that_adds_a_thought", [PAIR], template="{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n<think>\n{% endif %}"),
        jsonl("template_with_generation", [{"messages": HI}], template="{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}{% else %}{{ m.content }}<|eot_id|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"),
        refused("template_that_leaves_answers_out", [PAIR], ["chosen|answer"], template="{% for m in messages %}{% if m.role != 'assistant' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|eot_id|>\n{% endif %}{% endfor %}", stages="tokens"),
        jsonl("tools_is_iterable", [{"messages": HI}], template="{% if tools is iterable and tools | length > 0 %}[TOOLS]{% endif %}" + EXACT),
        jsonl("tools_is_sequence", [{"messages": HI}, {"messages": [*HI, user("and"), assistant("elm")]}], template="{{ 'a' if messages is sequence else 'b' }}{{ 'c' if tools is none else 'd' }}{{ 'e' if messages[0] is mapping else 'f' }}{{ 'g' if messages[0].content is string else 'h' }}" + EXACT),
    ]


def config(**changes):
    """tokenizer_config.json with other values."""
    return {"tokenizer_config.json": {"set": changes}}


def with_room(changes):
    """The same without the last of the tokens, so that the model has embeddings for one more (1023)."""
    tokens = json.loads((MODEL / "tokenizer.json").read_text())["added_tokens"][:-1]
    settings = {"pad_token": "<|eot_id|>", **changes.get("tokenizer_config.json", {"set": {}})["set"]}
    return {**changes, "tokenizer.json": {"set": {"added_tokens": tokens}}, "tokenizer_config.json": {"set": settings}}


def ids():
    """Token ids of TRL's trainers."""
    turns = {"messages": [user("one"), assistant("1"), user("two"), assistant("2")]}
    pairs = [{"prompt": [user("name a tree")], "chosen": [assistant("oak")], "rejected": [assistant("a stone")]}, {"prompt": [system("Be brief."), user("hi")], "chosen": [assistant("")], "rejected": [assistant("b")]}]
    texts = [{"prompt": "name a tree", "chosen": "oak", "rejected": "a stone"}]
    def sft(name, written, **more):
        return jsonl(f"sft_{name}", written, compare="sft", **more)
    def orpo(name, written, **more):
        return jsonl(f"orpo_{name}", written, compare="orpo", **more)
    return [
        sft("chats", [{"messages": HI}, {"messages": [system("Be brief."), *HI]}]),
        sft("chats_of_turns", [turns]),
        sft("completions", [{"prompt": [user("hi")], "completion": [assistant("oak")]}]),
        sft("template_without_bos", [{"messages": HI}], template=CHATML),
        sft("template_that_ends_with_eos", [{"messages": HI}], template=EXACT.replace("<|eot_id|>{% endfor %}", "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}")),
        sft("template_with_newline_at_the_end", [{"messages": HI}], template=TOOLS),
        sft("special_tokens_in_text", [{"messages": [user("What is <|eot_id|>?"), assistant("x")]}]),
        sft("eos_is_end_of_turn", [{"messages": HI}], model=config(eos_token="<|eot_id|>")),
        sft("sharegpt", [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "oak"}]}], rows=[{"messages": HI}]),
        orpo("pairs", pairs),
        orpo("texts", texts),
        orpo("template_without_bos", pairs, template=CHATML),
        orpo("eos_is_end_of_turn", pairs, model=config(eos_token="<|eot_id|>")),
        orpo("template_that_ends_with_eos", pairs, template=EXACT.replace("<|eot_id|>{% endfor %}", "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}")),
        orpo("implicit", [{"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}]),
        orpo("words_that_merge_at_the_border", [{"prompt": [user("hi")], "chosen": [assistant("\n\noak")], "rejected": [assistant(" b")]}], template="{% for m in messages %}{{ m.content }} {% endfor %}"),
    ]


def tokenizers():
    pairs = [{"prompt": [user("hi <|tool|> there")], "chosen": [assistant("oak")], "rejected": [assistant("b")]}]
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    def case(name, files, **more):
        more.setdefault("template", plain)
        return jsonl(f"tokenizer_{name}", pairs, compare="orpo", model=files, **more)
    def texts(name, files):
        return jsonl(f"tokenizer_text_{name}", [{"text": "An oak"}], compare="sft", model=files)
    def more(name, files, **rest):
        return case(name, with_room(files), **rest)
    added = {"1023": {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}
    return [
        case("as_it_is", {}),
        case("bos_null", config(bos_token=None)),
        case("pad_null", config(pad_token=None)),
        more("additional_special_tokens", config(additional_special_tokens=["<|tool|>"])),
        more("extra_special_tokens", config(extra_special_tokens=["<|tool|>"])),
        more("extra_special_tokens_by_name", config(extra_special_tokens={"tool_token": "<|tool|>"}), template="{{ tool_token }}" + plain),
        more("added_tokens_decoder", config(added_tokens_decoder=added)),
        more("added_tokens_json", {"added_tokens.json": json.dumps({"<|tool|>": 1023})}),
        case("special_tokens_map", {"special_tokens_map.json": json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})}),
        more("special_tokens_map_adds", {"special_tokens_map.json": json.dumps({"additional_special_tokens": ["<|tool|>"]})}),
        case("bos_as_object", config(bos_token={"content": "<|begin_of_text|>", "__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False})),
        case("add_bos_token_false", config(add_bos_token=False)),
        case("add_eos_token", config(add_eos_token=True)),
        case("class_llama", config(tokenizer_class="LlamaTokenizer", legacy=True)),
        case("class_llama_not_legacy", config(tokenizer_class="LlamaTokenizerFast", legacy=False), refused=["tokenizer_class|legacy"]),
        case("class_gpt2", config(tokenizer_class="GPT2Tokenizer"), refused=["tokenizer_class"]),
        case("class_qwen2", config(tokenizer_class="Qwen2Tokenizer"), refused=["tokenizer_class"]),
        case("split_special_tokens", config(split_special_tokens=True), refused=["split_special_tokens"]),
        more("token_that_strips", config(added_tokens_decoder={"1023": {**added["1023"], "lstrip": True, "rstrip": True}})),
        more("token_that_is_not_special", config(added_tokens_decoder={"1023": {**added["1023"], "special": False}})),
        texts("post_processor", {}),
        texts("no_post_processor", {"tokenizer.json": {"set": {"post_processor": None}}}),
        texts("bos_null", config(bos_token=None)),
        texts("add_bos_token_false", config(add_bos_token=False)),
        texts("add_eos_token", config(add_eos_token=True)),
        case("crlf_in_template_file", {"chat_template.jinja": plain.replace("\n", "\r\n")}, template=None),
        case("template_in_config_only", {"chat_template.jinja": None}, template=None),
        case("bos_in_template", config(bos_token=None), template="{{ bos_token }}" + plain),
    ]


def cases():
    return [(columns(), "columns of the recipe"), (split(), "splits"), (skipped(), "rows left out"), (rendered(), "rendered rows and templates"), (ids(), "token ids"), (tokenizers(), "tokenizers")]
