"""The parts of the script that shows a crash with llama-cpp-python alone: see `script`."""

from __future__ import annotations

from string import Template

LOAD = Template("""\
$imports
import llama_cpp

MODEL = sys.argv[1] if len(sys.argv) > 1 else $model

llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.n_gpu_layers = $n_gpu_layers
${loading}model = llama_cpp.llama_model_load_from_file(MODEL.encode(), params)
if not model:
    sys.exit(f"{MODEL}: llama.cpp cannot load it. Usage: {sys.argv[0]} MODEL.gguf")

params = llama_cpp.llama_context_default_params()
params.n_ctx = $n_ctx
params.n_batch = $n_batch
params.n_ubatch = $n_ubatch
params.n_seq_max = $n_seq_max
params.n_threads = params.n_threads_batch = $n_threads
params.kv_unified = $kv_unified
${context}params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_$pooling
context = llama_cpp.llama_init_from_model(model, params)
if not context:
    sys.exit("llama.cpp cannot make the context")
""")

CALL = Template('''

def $operation(rows$parameter):
    """One native call."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, $width)
    batch.n_tokens = len(rows)
    for i, (token, position, $ids, output) in enumerate(rows):
        batch.token[i] = token
        batch.pos[i] = position
$sequences
        batch.logits[i] = output
$nulls    rc = llama_cpp.llama_$operation(context, batch)
    llama_cpp.llama_batch_free(batch)
    if rc:
        sys.exit(f"no crash: llama_$operation returned {rc}")
$finite

''')

PROCESS = Template('''

def process(rows):
    """One native call."""
    batch = llama_cpp.llama_batch_ext_init(context)
    for token, position, seq_id, output in rows:
        i = llama_cpp.llama_batch_ext_add_token(batch, seq_id, token)
        if i < 0:
            sys.exit(f"no crash: llama_batch_ext_add_token returned {i}")
        llama_cpp.llama_batch_ext_set_pos(batch, i, ctypes.byref(llama_cpp.llama_pos(position)))
        llama_cpp.llama_batch_ext_set_output_logits(batch, i, bool(output))
    rc = llama_cpp.llama_process(context, llama_cpp.LLAMA_PROCESS_TYPE_DECODE, batch)
    llama_cpp.llama_batch_ext_free(batch)
    if rc:
        sys.exit(f"no crash: llama_process returned {rc}")
$finite

''')

FINITE = Template("""\
    for i, row in enumerate(rows):
        if row[3]:
            values = llama_cpp.llama_get_$row
            if not all(map(math.isfinite, values[:$width])):
                sys.exit(f"$says {i}")
""")

ONE = """\
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = seq_id"""

SEVERAL = """\
        batch.n_seq_id[i] = len(seq_ids)
        for j, seq_id in enumerate(seq_ids):
            batch.seq_id[i][j] = seq_id"""

NULLS = Template("""\
    if nulls:
$lines
""")

HELD = Template("""\
# What the memory holds before, sequence by sequence: token, position, sequence, output
HELD = [
$held
]

for rows in HELD:
    for begin in range(0, len(rows), $n_batch):
        $operation(rows[begin : begin + $n_batch])

""")

WHOLE = Template("""\
# token, position, $ids, output
BATCH = [
$batch
]

${embeddings}$operation(BATCH$argument)
""")

CHUNKS = Template("""\
# token, position, $ids, output
BATCH = [
$batch
]
CHUNK = $chunk  # tokens per native call

${embeddings}for begin in range(0, len(BATCH), CHUNK):
    $operation(BATCH[begin : begin + CHUNK])
""")

GREEDY = '''\
def sample(row, seq_id):
    """The likeliest token."""
    return max(range(n_vocab), key=llama_cpp.llama_get_logits_ith(context, row).__getitem__)


'''

SAMPLED = Template('''\
SAMPLING = {  # by sequence
$sampling
}
PROMPTS = {$prompts}  # tokens of each that were not drawn


def sample(row, seq_id):
    """Draw by llama.cpp's own samplers, with one number of noise for each token that was drawn."""
    how, drawn = SAMPLING[seq_id], SEQUENCES[seq_id][PROMPTS[seq_id] :]
    names, greedy = how["samplers"], how["temperature"] < $coldest
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(name, *values):
        sampler = getattr(llama_cpp, f"llama_sampler_init_{name}")(*values)
        llama_cpp.llama_sampler_chain_add(chain, sampler)
        return sampler

    def bias(biases):
        array = (llama_cpp.llama_logit_bias * len(biases))(*biases.items())
        add("logit_bias", n_vocab, len(biases), array)

    def grammar():
        if how["grammar"] and not how["grammar_lazy"]:
            add("grammar", vocab, how["grammar"].encode(), b"root")

    if how["ignore_eos"] or len(drawn) < how["min_tokens"]:
        ends = [token for token in range(n_vocab) if llama_cpp.llama_vocab_is_eog(vocab, token)]
        bias(dict.fromkeys(ends, float("-inf")))
    bias(how["logit_bias"])
    if names[:1] != ("penalties",):
        grammar()
    for place, name in enumerate(names):
        if name == "penalties":
            penalties = how["repeat_penalty"], how["frequency_penalty"], how["presence_penalty"]
            add("penalties", n_vocab, how["penalty_last_n"], *penalties)
            if place == 0:
                grammar()
        elif name == "dry":
            texts = [text.encode() for text in how["dry_sequence_breakers"]]
            breakers = (ctypes.c_char_p * len(texts))(*texts)
            last_n = how["dry_penalty_last_n"] if how["dry_penalty_last_n"] >= 0 else len(drawn) + 1
            values = how["dry_multiplier"], how["dry_base"], how["dry_allowed_length"], last_n
            add("dry", vocab, *values, breakers, len(texts))
        elif greedy or how["mirostat_mode"]:
            continue
        elif name in ("top_n_sigma", "top_k"):
            add(name, how[name])
        elif name in ("typical_p", "top_p", "min_p"):
            add(name.replace("typical_p", "typical"), how[name], 1)
        elif name == "xtc":
            add("xtc", how["xtc_probability"], how["xtc_threshold"], 1, how["seed"])
        else:
            add("temp_ext", how["temperature"], how["dynatemp_range"], how["dynatemp_exponent"])
    noise = None
    if greedy:
        add("greedy")
    elif how["mirostat_mode"] == 1:
        add("mirostat", n_vocab, how["seed"], how["mirostat_tau"], how["mirostat_eta"], 100)
    elif how["mirostat_mode"]:
        add("mirostat_v2", how["seed"], how["mirostat_tau"], how["mirostat_eta"])
    else:
        noise = add("dist", how["seed"])
    for token in drawn:
        llama_cpp.llama_sampler_accept(chain, token)
        if noise:
            one = llama_cpp.llama_token_data_array((llama_cpp.llama_token_data * 1)(), 1, -1, False)
            llama_cpp.llama_sampler_apply(noise, ctypes.byref(one))
    token = llama_cpp.llama_sampler_sample(chain, context, row)
    llama_cpp.llama_sampler_free(chain)
    return token


''')

GENERATE = Template("""\
# The sequences that were being continued, with their tokens so far, and how many more each may get.
SEQUENCES = {
$sequences
}
LEFT = {$left}
CHUNK = $chunk  # most tokens per native call
BESIDE = $beside  # most of them from prompts, if it also generates

vocab = llama_cpp.llama_model_get_vocab(model)
n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
pending = {seq_id: list(tokens) for seq_id, tokens in SEQUENCES.items()}
position = dict.fromkeys(SEQUENCES, 0)


${sample}for _ in range($calls):
    rows, ends = [], {}
    n = sum(len(tokens) == 1 for tokens in pending.values())  # sequences that generate: they come first
    room = min(CHUNK, n + BESIDE) if n else CHUNK
    for seq_id in sorted(pending, key=lambda seq_id: len(pending[seq_id]) > 1):
        tokens = pending[seq_id][: room - len(rows)]
        del pending[seq_id][: len(tokens)]
        for token in tokens:
            rows.append((token, position[seq_id], seq_id, 0))
            position[seq_id] += 1
        if tokens and not pending[seq_id]:
            rows[-1] = (*rows[-1][:3], 1)
            ends[seq_id] = len(rows) - 1
    decode(rows)
    for seq_id, row in ends.items():
        token = sample(row, seq_id)
        pending[seq_id] = [token]
        SEQUENCES[seq_id].append(token)
        LEFT[seq_id] -= 1
        if llama_cpp.llama_vocab_is_eog(vocab, token) or not LEFT[seq_id]:
            del pending[seq_id]
    if not pending:
        break
""")
