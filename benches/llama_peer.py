"""llama.cpp's side of `other_pairs.py generate --peer llama.cpp`: needs numpy, gguf and llama-cpp-python.

    python llama_peer.py convert MODEL OUT.gguf [--type bf16|q4_0|f32] [--ends bf16|q8_0|..]
    python llama_peer.py generate OUT.gguf PROMPTS.json --limit 128 --threads 2 [--together]

`convert` writes a Llama's safetensors as GGUF, without its tokenizer: prompts are ids. Matrices are stored as `--type`, the
embeddings and the head as `--ends` (as the matrices, unless told otherwise).

`generate` continues each prompt greedily, prompts one after the other, or all `--together` in batches with a token of each. It prints one
JSON object: tokens made, seconds, CPU seconds and the ids.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(folder):
    """Names and values in f32 of a folder's safetensors."""
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + at for at in about["data_offsets"])
            part = data[begin:end]
            if about["dtype"] == "BF16":
                values = (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(part, {"F32": "<f4", "F16": "<f2"}[about["dtype"]]).astype(np.float32)
            yield name, values.reshape(about["shape"])


def neighbours(weight, heads):
    """A projection's rows in the order of llama.cpp's rotation, which turns neighbours where ours turns halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert(args):
    import gguf

    config = json.loads((args.model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    if (config.get("rope_scaling") or rope).get("rope_type", "default") != "default":
        raise SystemExit("scaled rotations are not converted")
    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, values in tensors(args.model):
        module = name.removesuffix(".weight")
        if module in ENDS:
            if module == "lm_head" and config.get("tie_word_embeddings"):
                continue
            new, stored = ENDS[module], args.ends or args.type
        else:
            _, _, number, module = module.split(".", 3)
            new, stored = f"blk.{number}.{LAYER[module]}", args.type
            if module == "self_attn.q_proj":
                values = neighbours(values, heads)
            elif module == "self_attn.k_proj":
                values = neighbours(values, kv_heads)
        kind = gguf.GGMLQuantizationType[stored.upper() if values.ndim > 1 else "F32"]
        writer.add_tensor(f"{new}.weight", gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """A model and room for `count` sequences of `length` tokens each."""

    def __init__(self, path, count, length, threads):
        import llama_cpp as library

        self.library = library
        library.llama_backend_init()
        self.log = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self.log, None)
        self.model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        params = library.llama_context_default_params()
        params.n_ctx = -(-length // 256) * 256 * count
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = count
        params.n_threads = params.n_threads_batch = threads
        self.context = library.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("no context")
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        self.batch = library.llama_batch_init(512, 0, 1)

    def step(self, tokens):
        """Takes (sequence, position, id, wanted); returns the most probable id behind each wanted one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for at, (sequence, position, token, wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, wanted
            batch.seq_id[at][0] = sequence
        if self.library.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        wanted = [at for at, token in enumerate(tokens) if token[3]]
        logits = (self.library.llama_get_logits_ith(self.context, at) for at in wanted)
        return [int(np.ctypeslib.as_array(row, (self.vocabulary,)).argmax()) for row in logits]

    def clear(self):
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)


def answers(context, prompts, limit):
    """Greedy ids of each prompt, all prompts together; nothing ends them but the limit."""
    made = [[] for _ in prompts]
    flat = [(s, at, token, at + 1 == len(ids)) for s, ids in enumerate(prompts) for at, token in enumerate(ids)]
    for first in range(0, len(flat), 512):
        part = flat[first : first + 512]
        ends = [token[0] for token in part if token[3]]
        for sequence, token in zip(ends, context.step(part)):
            made[sequence].append(token)
    for _ in range(limit - 1):
        tokens = [(s, len(ids) + len(made[s]) - 1, made[s][-1], True) for s, ids in enumerate(prompts)]
        for sequence, token in enumerate(context.step(tokens)):
            made[sequence].append(token)
    return made


def generate(args):
    prompts = json.loads(args.prompts.read_text())
    groups = [prompts] if args.together else [[ids] for ids in prompts]
    context = Context(args.gguf, max(map(len, groups)), max(map(len, prompts)) + args.limit, args.threads)
    answers(context, groups[0], 4)
    made = []
    began, cpu = time.perf_counter(), time.process_time()
    for group in groups:
        context.clear()
        made += answers(context, group, args.limit)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"tokens": sum(map(len, made)), "seconds": seconds, "cpu_s": cpu, "ids": made}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert")
    one.add_argument("model", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--type", default="bf16")
    one.add_argument("--ends")
    one.set_defaults(run=convert)
    one = commands.add_parser("generate")
    one.add_argument("gguf", type=Path)
    one.add_argument("prompts", type=Path)
    one.add_argument("--limit", type=int, default=128)
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--together", action="store_true")
    one.set_defaults(run=generate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
