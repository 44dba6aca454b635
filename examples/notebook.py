"""A notebook as a script: each ``# %%`` is a cell for Jupyter, VS Code or Spyder."""

# %% Load a model. It runs in a child process; this one never loads llama.cpp.
from pathlib import Path

from crumplezone import Batch, Decoder, Llama, embedded_model
from crumplezone.reports.store import Store

llama = Llama(str(embedded_model()), n_ctx=512, verbose=False)
print("llama.cpp runs in process", llama.pid)

# %% Chat, token by token.
messages = [{"role": "user", "content": "What is a crumple zone? One sentence."}]
for chunk in llama.create_chat_completion(messages, max_tokens=48, temperature=0.0, stream=True):
    print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
print()
llama.close()

# %% Provoke a crash: llama_encode of a model that has no encoder is a SIGSEGV inside llama.cpp.
decoder = Decoder(embedded_model(), preflight=False)
batch = Batch.of([decoder.tokenize("Hello"), decoder.tokenize("Good morning")])
result = decoder.encode(batch)

# %% It was survived: every sequence has its embedding, from the safe rung.
for seq_id in result.seq_ids:
    print(seq_id, result.rung(seq_id), result.embeddings(seq_id)[:4])

# %% What happened? `crumplezone triage` in a shell knows more verbs.
decoder.close()  # the reports are written then
directory = Path(result.reports[0])
report = Store(directory.parent).read(directory.name)
if report.signature and report.verdict:
    print(f"{report.signature.title}: {report.verdict.kind}, since {report.verdict.because}")
for frame in next(thread for thread in report.evidence.threads if thread.crashed).native[:4]:
    print("   ", frame.symbol)
print((directory / "report.txt").read_text()[:500])
